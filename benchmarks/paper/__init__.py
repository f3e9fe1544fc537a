"""The papers' claims, measured by our own software: ``python -m benchmarks.paper --help``.

One module per experiment, its protocol in the docstring. ``profiles`` says how large, ``lab`` trains and measures,
``verdict`` decides whether a claim holds, ``page`` writes docs/paper.md.
"""
