"""The command line: ``tensortrain --help``. It parses, calls the library, and prints."""

from tensortrain.cli.app import main

__all__ = ["main"]
