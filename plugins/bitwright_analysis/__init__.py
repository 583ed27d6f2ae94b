"""Where quantization hurts and why: analysis, visualization, dumps and comparison."""
