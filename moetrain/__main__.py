"""`python -m moetrain`, the same as `moetrain`."""

from moetrain.cli.start import main
from moetrain.runtime import leave

leave(main())
