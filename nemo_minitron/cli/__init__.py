"""The command line: one file per group of commands, and tables for the screen. It handles no tensors."""
