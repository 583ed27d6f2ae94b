"""The PyTorch backend: torch.export captures, the captured graph runs with the user's own parameters."""
