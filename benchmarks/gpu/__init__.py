"""Measurements on a GPU, in pieces that each end within three minutes; ``python -m benchmarks.gpu --help``."""
