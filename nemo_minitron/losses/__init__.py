"""Losses of a distillation: plain torch, no model and no file."""
