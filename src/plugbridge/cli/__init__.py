"""The command line: one command, one short function. The only package that prints."""

from plugbridge.cli.application import app, main

__all__ = ["app", "main"]
