"""Calibration: from statistics to encodings."""
