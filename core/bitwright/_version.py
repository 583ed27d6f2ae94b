"""The version, where the whole core can read it without importing what `bitwright` offers."""

__version__ = "0.1.0"
