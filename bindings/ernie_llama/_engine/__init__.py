"""A model and a context: evaluates, samples, scores and embeds token ids; knows nothing of chats."""
