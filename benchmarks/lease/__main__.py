"""`python -m benchmarks.lease`."""

import sys

from benchmarks.lease.main import main

sys.exit(main())
