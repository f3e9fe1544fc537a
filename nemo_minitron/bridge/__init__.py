"""Floor 4: one foreign library per file.

Transformers, tokenizers, datasets, lm-eval, huggingface_hub, matplotlib.
"""
