"""Image sets that are drawn: a prostate phantom, stained tissue, and their best possible score."""
