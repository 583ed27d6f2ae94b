"""Files for the runtimes of language models and of ggml, made from a network and its encodings, and proven on them."""
