"""`python -m runtime`."""

from __future__ import annotations

import sys

from runtime.cli.main import main

sys.exit(main())
