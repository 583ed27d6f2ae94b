"""`aimet_tensorflow.keras`: what takes a model gives a new one, as in AIMET."""
