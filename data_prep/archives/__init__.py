"""One module per archive."""
