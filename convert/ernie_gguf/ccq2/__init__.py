"""The 2-bit type: its rows, code maps and encoder. Knows no checkpoint and no file."""
