"""`python -m benchmarks.quality`."""

import sys

from .main import main

sys.exit(main())
