"""Text in, the dictionaries of OpenAI's API out: completions, chat templates, answers. Touches no pointer."""
