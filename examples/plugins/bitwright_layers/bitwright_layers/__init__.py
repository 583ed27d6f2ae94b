"""bitwright for lists of layers."""
