"""Measurements of models, and the report, quality gate and plots made from them."""
