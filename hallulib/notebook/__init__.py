"""The machine of the book: parameters, figures, numbers and grids of chapters."""
