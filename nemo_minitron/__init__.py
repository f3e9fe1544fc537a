"""nemo_minitron: smaller language models out of bigger ones, by the Minitron recipe."""

__version__ = "0.1.0"
