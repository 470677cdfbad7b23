"""``python -m plugbridge``."""

from plugbridge.cli import main

main()
