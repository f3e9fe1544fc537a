"""Proof of a family table on tiny real models."""
