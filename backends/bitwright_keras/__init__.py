"""The Keras 3 backend."""
