"""What Baidu ships: shards, configuration, names, vocabulary, and how matrices are stored. Knows no target."""
