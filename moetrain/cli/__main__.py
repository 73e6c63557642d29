"""Entry point of `python -m moetrain.cli`, the form in which torchrun and DeepSpeed's launcher start ranks."""

import sys

from moetrain.cli.main import main

sys.exit(main())
