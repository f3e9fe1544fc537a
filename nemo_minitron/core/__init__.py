"""Floor 2: mathematics on tensors. Pure functions that read a family table; no files, no frameworks."""
