"""One solution for each cell that a reader of the notebooks writes."""
