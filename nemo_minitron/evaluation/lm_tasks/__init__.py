"""Tasks that lm-eval lacks, in its own format."""
