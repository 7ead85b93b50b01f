"""`ernie-gguf verify`: a file against its checkpoint, decoded by other code than the writer's."""
