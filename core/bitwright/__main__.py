"""``python -m bitwright``: the command line."""

import sys

from bitwright.cli import main

sys.exit(main())
