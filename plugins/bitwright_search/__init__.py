"""Searches over recipes and precisions: AutoQuant and mixed precision."""
