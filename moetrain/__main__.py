"""`python -m moetrain`, the same as `moetrain`."""

from moetrain.cli.start import command

command()
