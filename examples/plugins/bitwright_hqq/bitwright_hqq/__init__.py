"""A technique for bitwright: weight scales by half-quadratic optimization."""
