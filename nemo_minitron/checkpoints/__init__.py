"""Hugging Face folders on disk: headers, config.json, side files, and a writer of shards. No transformers."""
