"""The NeMo plugin: the model, its transforms, the callbacks that distil, and one training through NeMo.

Only this package and ``training`` import nemo and lightning, which costs 10 to 20 seconds.
"""

import nemo_minitron.training  # noqa: F401 (keeps NeMo's telemetry library silent)
