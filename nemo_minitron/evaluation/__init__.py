"""Measurements of models and what is made of them: report, quality gate, plots."""
