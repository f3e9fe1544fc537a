"""The configuration: one file per section, every key typed and documented.

The sections hold values only; ``compose`` makes them from names and overrides, with Hydra.
"""
