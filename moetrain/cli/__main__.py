"""`python -m moetrain.cli` is the `moetrain` command: torchrun and DeepSpeed's launcher start ranks this way."""

import sys

from moetrain.cli.main import main

sys.exit(main())
