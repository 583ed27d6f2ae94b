"""The model as the core sees it: canonical graph, parameters, edits."""
