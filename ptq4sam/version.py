"""The version of the package, for the package itself to import."""

__version__ = "0.1.0"
