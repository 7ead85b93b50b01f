"""The container: types and sizes, reader, writer, split files. Knows nothing of ERNIE."""
