"""From paths to documents, token ids and samples, the same on every machine for a given seed."""
