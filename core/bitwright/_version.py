"""The version, where the whole core can read it without importing what `bitwright` offers."""

__version__ = "1.0.0rc1"
