"""Checkpoints by their names on the Hub: headers by range requests, downloads, conversion without storing them."""
