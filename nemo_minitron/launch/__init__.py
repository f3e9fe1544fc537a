"""Between the stages and the flows: how a stage becomes a process, and what its end means.

Free of Prefect. A stage runs in this process, in one of its own, in several under torchrun, or as a
Slurm job (``launch.kind``); whatever happens to it, the caller gets a ``Result`` or an exception
that says what kind of failure it was.
"""
