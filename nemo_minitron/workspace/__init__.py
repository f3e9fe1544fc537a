"""A run's folder: artifacts with manifests, locks, logs, and what can be made again.

An artifact is a folder with a manifest, which is written last and is the truth.
"""
