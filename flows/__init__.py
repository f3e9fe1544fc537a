"""Prefect flows. The only code that imports prefect.

It orchestrates, the artifacts carry the truth.
"""
