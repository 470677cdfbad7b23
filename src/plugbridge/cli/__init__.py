"""The command line: one command, one short function. The only package that prints."""

import sys


def main() -> None:
    """Entry point. Ctrl-C while the first modules are imported ends it without a word, too."""
    try:
        from plugbridge.cli.application import main as begin
    except KeyboardInterrupt:
        sys.exit(130)
    begin()
