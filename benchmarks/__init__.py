"""Speed and memory duels and paper tables.

Each prints a table of ratios measured in one run, and writes JSON.
"""
