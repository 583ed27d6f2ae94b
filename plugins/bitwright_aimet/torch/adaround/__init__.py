"""`aimet_torch.adaround`."""
