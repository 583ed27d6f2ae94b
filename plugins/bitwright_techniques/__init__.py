"""The built-in techniques, one file each."""
