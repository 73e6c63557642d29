"""`python -m moetrain`, the same as `moetrain`."""

import sys

from moetrain.cli.main import main

sys.exit(main())
