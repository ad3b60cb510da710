"""Entry point of ``python -m fmtrain``, for launchers such as torchrun."""

from fmtrain.cli import main

main()
