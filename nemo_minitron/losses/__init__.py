"""Losses of a distillation: plain torch, no model and no file.

A name that ends in capitals is a tensor, and each letter an axis: T tokens, C tokens of a chunk, N
tokens of a block of it, V vocabulary, W those of its entries that a shard holds, K known entries of
a token, H hidden channels (the student's, where there are two models), G hidden channels of the
teacher, B samples, S positions, U channels of queries, keys or values, R relation heads, D channels
of one; 1 an axis kept after a sum.
"""
