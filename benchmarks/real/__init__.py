"""Real models through the whole recipe; ``python -m benchmarks.real --help``."""
