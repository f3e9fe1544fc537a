"""NeMo model transforms: callables ``nn.Module -> nn.Module`` that prune a model in memory by a plan.

They read the same family table and call the same ``pruning.slice`` as the streaming stage, so that
both give the same weights. The module is changed **in place** (NeMo 2.x ignores what a transform
returns) and returned.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from nemo_minitron.families import architecture_of
from nemo_minitron.pruning.plan_file import Plan, read_plan
from nemo_minitron.pruning.select import Keep
from nemo_minitron.pruning.slice import Cut, cut_tensor, pieces


class Pruning:
    """Prunes width and depth by a plan."""

    def __init__(self, plan: Plan | Path | str) -> None:
        """Takes a plan, or the folder of one."""
        self.plan = plan if isinstance(plan, Plan) else read_plan(Path(plan))

    def __call__(self, module: nn.Module) -> nn.Module:
        """Prunes the Hugging Face model that ``module`` is or wraps.

        Raises:
            ValueError: there is none, or the plan was made for another model.
        """
        model = _hf_model(module)
        source = architecture_of(model.config.to_dict(), type(model).__name__)
        sizes = source.sizes
        planned = {axis: self.plan.before[axis] for axis in self.axes}
        found = {axis: sizes[axis] for axis in self.axes}
        if found != planned:
            raise ValueError(f"the plan was made for sizes {planned}, the model has {found}")
        cut = Cut(source, self.keep, self.layers)
        state = _stored_state(model)
        pruned_state = {
            piece.name: cut_tensor(state[piece.source], piece, sizes)
            for piece in pieces(cut, list(state))
        }
        pruned = _build(model, cut.result.config, pruned_state)
        pruned.train(model.training)
        model.__dict__ = pruned.__dict__
        return module

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes whose sizes in the model must be those that the plan was made for."""
        return tuple(self.plan.before)

    @property
    def keep(self) -> Keep:
        """Kept units of every axis that shrinks."""
        return dict(self.plan.keep)

    @property
    def layers(self) -> tuple[int, ...]:
        """Kept layers."""
        return self.plan.layers_kept


class WidthPruning(Pruning):
    """Prunes the width of a plan and leaves all layers in place."""

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers of the source model."""
        return tuple(range(self.plan.before["layers"]))


class DepthPruning(Pruning):
    """Drops the layers of a plan and leaves their width as it is.

    The model may have been pruned in width before.
    """

    @property
    def axes(self) -> tuple[str, ...]:
        """Only the number of layers matters."""
        return ("layers",)

    @property
    def keep(self) -> Keep:
        """Nothing is cut in width."""
        return {}


def _hf_model(module: nn.Module) -> Any:
    for candidate in module.modules():
        if isinstance(candidate, transformers.PreTrainedModel):
            return candidate
    raise ValueError(f"{type(module).__name__} holds no Hugging Face model")


def _stored_state(model: Any) -> dict[str, Tensor]:
    """The weights under the names and in the shapes that they have on disk, which the tables describe.

    In memory, transformers fuses experts and renames modules.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tied = [
            name
            for name, tensor in state.items()
            if tensor is not None and name.startswith("lm_head.")
        ]
        for name in tied:
            del state[name]
    return dict(revert_weight_conversion(model, state))


def _build(model: Any, config: Mapping[str, Any], state: dict[str, Tensor]) -> Any:
    """A model of the pruned shape with these weights, strictly loaded."""
    hf_config = type(model.config).from_dict(dict(config))
    built, info = type(model).from_pretrained(
        None, config=hf_config, state_dict=state, dtype=model.dtype, output_loading_info=True,
        trust_remote_code=False,
    )  # fmt: skip
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys")}
    if any(wrong.values()):
        raise ValueError(f"the pruned {type(model).__name__} does not load strictly: {wrong}")
    return built.to(model.device)
