"""Entry point of `python -m moetrain.cli`, the form in which torchrun and DeepSpeed's launcher start ranks."""

from moetrain.cli.start import command

command()
