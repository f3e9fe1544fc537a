"""From scores to a smaller checkpoint: sizes, costs, the units that stay, slices, the stream."""
