"""Importance of units and layers: formulas, sums that merge, and the passes that make the sums."""
