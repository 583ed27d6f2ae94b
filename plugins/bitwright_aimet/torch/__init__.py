"""`aimet_torch`: what takes a module changes it in place where AIMET does, and gives modules back."""
