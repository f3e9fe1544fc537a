"""The part of ``MinitronModel`` that chooses what is fast on GPUs: compiled layers, one kernel for AdamW."""

import inspect
import sys
from typing import Any

from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

from nemo_minitron.families import Family
from nemo_minitron.training.compilation import Compiled

_FUSED = ("adam", "adamw")
"""NeMo's names of torch's optimisers that do a step in one kernel on CUDA."""


class FastOnGpus:
    """To be inherited from before ``ModelPT``.

    Attributes:
        compiled: whether layers and loss are compiled while the model is trained.
    """

    compiled = False
    model: Any
    family: Family
    cfg: Any
    _trainer: Any
    _compiled_layers: Compiled | None = None

    def on_fit_start(self) -> None:
        """Compiles the layers, where it is asked for."""
        super().on_fit_start()  # type: ignore[misc]
        if self.compiled and self._compiled_layers is None:
            self._compiled_layers = Compiled(self.model, self.family, "student")
            if self._trainer.is_global_zero:
                print(
                    f"training.compile: {self._compiled_layers}; the first step takes longer",
                    file=sys.stderr,
                    flush=True,
                )

    def compiles_loss(self) -> bool:
        """Whether the loss is compiled: not where the layers have shown that nothing can be."""
        layers = self._compiled_layers
        return self.compiled and not (layers is not None and layers.failed)

    def on_fit_end(self) -> None:
        """Gives the layers their own code back."""
        super().on_fit_end()  # type: ignore[misc]
        if self._compiled_layers is not None:
            self._compiled_layers.undo()
            self._compiled_layers = None

    def setup_optimization(self, optim_config: Any = None, optim_kwargs: Any = None) -> None:
        """NeMo's, with one kernel for all of a step of Adam and AdamW on CUDA, if nothing else is said."""
        given = self.cfg.get("optim") if optim_config is None else optim_config
        fused = {"fused": True} if self._is_fused(given or {}) else {}
        super().setup_optimization(optim_config, {**fused, **(optim_kwargs or {})})  # type: ignore[misc]
        if self._trainer is not None and self._trainer.precision != "16-mixed":
            # it scales no loss, but Lightning would refuse to clip the gradients of an optimiser that could
            optimizer = getattr(self, "_optimizer", None)
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer._step_supports_amp_scaling = False

    def _is_fused(self, optim: Any) -> bool:
        trainer, name = self._trainer, optim.get("name")
        if trainer is None or trainer.strategy.root_device.type != "cuda" or name not in _FUSED:
            return False
        # under float16 they divide by the loss's scale themselves, and gradients could not be clipped
        if trainer.precision == "16-mixed" or {"fused", "foreach", "args"} & set(optim):
            return False
        return "fused" in inspect.signature(AVAILABLE_OPTIMIZERS[name]).parameters

    def choose_kernels(self, checkpoint: dict[str, Any]) -> None:
        """Lets a training go on with this machine's choice: torch would take over the checkpoint's."""
        optim = self.cfg.get("optim") or {}
        for state in checkpoint.get("optimizer_states", []):
            for group in state["param_groups"]:
                if group.get("fused") is not None or self._is_fused(optim):
                    group["fused"] = True if self._is_fused(optim) else optim.get("fused")
