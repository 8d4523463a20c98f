"""The package's version, for whoever writes it into a file."""

from importlib.metadata import version

__version__ = version("pace-convert")
