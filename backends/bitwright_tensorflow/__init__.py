"""The TensorFlow backend: graphs of v1 sessions, SavedModels, concrete functions and frozen files."""
