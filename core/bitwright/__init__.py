"""bitwright: simulate, improve and export quantized neural networks."""

__version__ = "0.1.0"
