"""Readers and writers of encodings files."""
