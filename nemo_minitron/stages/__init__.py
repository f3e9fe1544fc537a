"""One file per arrow of the pipeline. Each has ``recipe(config) -> Recipe``, or ``run(config) -> Result``.

Stages meet on disk, not in memory; ``run.py`` runs them.
"""
