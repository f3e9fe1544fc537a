"""Floor 4: one foreign library per file (transformers, tokenizers, datasets, lm-eval, matplotlib ...)."""
