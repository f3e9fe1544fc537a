"""One file per arrow of the pipeline. Each has ``run(config) -> Result``.

Stages meet on disk, not in memory.
"""
