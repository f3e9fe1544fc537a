"""What processes of the command line import sooner or later, all but Prefect, which reads its settings meanwhile."""

import importlib

import nemo_minitron.cli.main
import nemo_minitron.plugin.trainer  # noqa: F401 (NeMo and Lightning)
from nemo_minitron.stages.run import STAGES

for module in {*STAGES.values(), "transformers.models.llama.modeling_llama"}:
    importlib.import_module(module)
