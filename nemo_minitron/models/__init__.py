"""Models in memory: loading, hooks, layers left out and fed by hand, int8, fp8, offload, ranks."""
