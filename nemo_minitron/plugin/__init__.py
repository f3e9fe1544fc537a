"""Floor 4: the NeMo plugin. The only place that imports nemo and lightning.

Importing it costs 10 to 20 seconds.
"""

import logging

# nemo's telemetry library says at import that it collects nothing
logging.getLogger("nv_one_logger").setLevel(logging.ERROR)
