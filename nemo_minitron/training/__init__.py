"""The parts that a training is made of, on Lightning.

Importing Lightning and NeMo costs 10 to 20 seconds.
"""

import logging

# nemo's telemetry library says at import that it collects nothing
logging.getLogger("nv_one_logger").setLevel(logging.ERROR)
