"""Floor 3: what lies on disk. An artifact is a folder with a manifest.

The manifest is written last and is the truth.
"""
