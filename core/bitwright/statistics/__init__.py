"""Mergeable statistics, one class a file."""
