"""What the tests share: checkpoints they make, servers they start, the command line."""
