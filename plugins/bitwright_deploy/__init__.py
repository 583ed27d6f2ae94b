"""Bringing an export onto a target, and comparing what the target computes."""
