"""The build of the patched llama.cpp: `ernie-gguf build`, `make build`, the wheel. Knows no GGUF file."""
