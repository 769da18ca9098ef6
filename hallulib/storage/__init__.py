"""What is kept: runs found by their settings, checkpoints that resume, files written whole."""
