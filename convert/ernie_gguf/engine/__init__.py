"""The patched llama.cpp: building it (`ernie-gguf build`, `make build`, the wheel) and describing it (`info`)."""
