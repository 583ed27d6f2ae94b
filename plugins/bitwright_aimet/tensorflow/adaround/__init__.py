"""`aimet_tensorflow.adaround`."""
