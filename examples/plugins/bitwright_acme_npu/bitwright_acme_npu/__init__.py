"""A target of bitwright for an imaginary NPU, with a simulator of its integer arithmetic."""
