"""The package's version, where any room can read it without an installation."""

__version__ = "0.2.0"
