"""``python -m repmetrics``."""

from repmetrics.cli import main

main()
