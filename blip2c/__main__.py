"""python -m blip2c: the command line."""

import sys

from blip2c.cli import main

sys.exit(main())
