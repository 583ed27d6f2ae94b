"""The parts of placement: activations, parameters, ties, overrides and hardware exceptions."""
