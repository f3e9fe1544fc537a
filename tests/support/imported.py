"""What processes of the command line import sooner or later, all but Prefect, which reads its settings meanwhile.

The same goes for ``datasets``, and so for lm-eval. Of these there is what they import themselves.
"""

import gc
import importlib
import os

from nemo_minitron.launch.start_up import load_scipy_signal_later

gc.disable()  # a tenth of the time: an import leaves little garbage
load_scipy_signal_later()

import nemo_minitron.cli.main  # noqa: E402
import nemo_minitron.plugin.trainer  # noqa: E402, F401 (NeMo and Lightning)
from nemo_minitron.config.compose import load_config  # noqa: E402
from nemo_minitron.families import families  # noqa: E402
from nemo_minitron.families.table import OWN_TABLES  # noqa: E402
from nemo_minitron.families.wrapper import wrappers  # noqa: E402
from nemo_minitron.stages.run import STAGES  # noqa: E402

_OF_LM_EVAL = ("requests", "sacrebleu", "multiprocess", "xxhash", "pyarrow.dataset")
_OF_PREFECT = (
    "griffe", "pydantic", "pydantic_settings", "pydantic_extra_types.pendulum_dt", "pendulum", "httpx", "jsonschema",
    "websockets.asyncio.client", "opentelemetry.trace", "prometheus_client", "amplitude", "click", "humanize", "coolname",
    "asgi_lifespan", "cachetools", "orjson", "slugify", "dotenv",
)  # fmt: skip

for module in {
    *STAGES.values(),
    "transformers.models.llama.modeling_llama",
    *_OF_LM_EVAL,
    *_OF_PREFECT,
}:
    importlib.import_module(module)
os.environ.pop(OWN_TABLES, None)  # of the test that happens to be the first to need a process
# what they read sooner or later too
families(), wrappers(), load_config("config", [])
gc.freeze()  # no fork looks for garbage here, or gets a copy of what it looks at
gc.enable()
