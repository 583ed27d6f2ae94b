"""`aimet_tensorflow`: graphs of TF 1 sessions here, Keras models in `keras`; what takes a session gives a new one."""
