"""What is written, and the runtimes that run it."""
