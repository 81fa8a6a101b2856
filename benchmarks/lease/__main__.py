"""`python -m benchmarks.lease`."""

import sys

from .main import main

sys.exit(main())
