"""Programs that run a model: `ernie-gguf serve` and `chat`."""
