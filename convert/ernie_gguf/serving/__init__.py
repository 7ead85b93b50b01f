"""Whether a model fits, and the programs that run it: `ernie-gguf info`, `serve`, `run`, `chat` and `eval`."""
