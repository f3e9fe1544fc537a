"""NeMo model transforms: callables ``nn.Module -> nn.Module`` that prune a model in memory by a plan.

They read the same family table and call the same ``pruning.slice`` as the streaming stage, so that
both give the same weights. The module is changed **in place**, its parameters included, and returned:
an optimiser that holds them already trains the pruned ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from nemo_minitron.families import CHOSEN_EXPERTS, architecture_of
from nemo_minitron.models.causal_lm import layer_list
from nemo_minitron.models.reshape import reshape
from nemo_minitron.plugin.speech_models import (
    check_around,
    cut_along,
    is_speech_model,
    put_together,
)
from nemo_minitron.pruning.head_merge import HeadMerge
from nemo_minitron.pruning.plan_file import Plan, read_plan
from nemo_minitron.pruning.select import Keep
from nemo_minitron.pruning.slice import Cut, cut_tensor, pieces

_ADAPTERS = (
    "{} holds a model with adapters (PEFT); merge them first (merge_and_unload), and attach new ones to "
    "what is pruned"
)


class Pruning:
    """Prunes width and depth by a plan.

    The Hugging Face model keeps its modules and parameters as objects, and all that was set on them:
    hooks, ``requires_grad``, dtypes, gradient checkpointing, attention implementation, generation
    config. A model that the plan has pruned already is left as it is.
    """

    def __init__(self, plan: Plan | Path | str, at: str | None = None) -> None:
        """Takes a plan, or the folder of one.

        Args:
            plan: what stays.
            at: path of the Hugging Face model in the module that is called with, such as ``llm``;
                None: the only one in it.
        """
        self.plan = plan if isinstance(plan, Plan) else read_plan(Path(plan))
        if "vocab" in self.plan.keep:
            raise ValueError(
                "the plan cuts the vocabulary, and no tokenizer lies in a module; use minitron prune"
            )
        self.at = at

    def __call__(self, module: nn.Module) -> nn.Module:
        """Prunes the Hugging Face model that ``module`` is or wraps.

        Raises:
            ValueError: there is none, or more than one, or the plan was made for another model;
                adapters are attached to it, or it has no output head.
        """
        if self.at is None and is_speech_model(module):
            return self._of_speech(module)
        self._prune(causal_lm_in(module, self.at))
        return module

    def _of_speech(self, module: Any) -> nn.Module:
        """One of NeMo's speech language models, with what reads or feeds the LM's hidden states."""
        if any(type(part).__module__.partition(".")[0] == "peft" for part in module.modules()):
            raise ValueError(_ADAPTERS.format(type(module).__name__))
        hidden = module.embed_tokens.embedding_dim
        with put_together(module) as model:
            if "hidden" in self.keep:
                check_around(module, hidden)
            done = self._prune(model)
        if done and "hidden" in self.keep:
            cut_along(module, self.keep["hidden"], hidden)
        return module

    def _prune(self, model: Any) -> bool:
        """Prunes a causal LM; False where it was pruned before."""
        source = architecture_of(model.config.to_dict(), type(model).__name__)
        if model.base_model is model and model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} has no output head; expected a causal LM, as "
                f"{source.family.architecture}"
            )
        sizes = source.sizes
        planned, found = self._of_axes(self.plan.before), self._of_axes(sizes)
        if found != planned:
            if found == self._of_axes(self.result):
                return False
            raise ValueError(f"the plan was made for sizes {planned}, the model has {found}")
        cut = Cut(source, self.keep, self.layers, self.experts_per_token, self.merge)
        state = _stored_state(model)
        lost = next((name for name, _, _ in source.tensors() if name not in state), None)
        if lost is not None:
            raise ValueError(
                f"{type(model).__name__}: {lost} is not in the model; a module that keeps it elsewhere "
                "(other than NeMo's speechlm2, which is given as a whole) has to put it back before the "
                "model is pruned, and to cut what reads the model's width"
            )
        pruned_state = {
            piece.name: cut_tensor(state[piece.source], piece, sizes)
            for piece in pieces(cut, list(state))
        }
        pruned = _build(model, cut.result.config, pruned_state)
        reshape(model, pruned, layer_list(model, source.family), self.layers)
        return True

    def _of_axes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {axis: sizes[axis] for axis in self.axes}

    @property
    def result(self) -> Mapping[str, int]:
        """The sizes that a pruned model has."""
        return self.plan.after

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes whose sizes in the model must be those that the plan was made for."""
        return tuple(self.plan.before)

    @property
    def keep(self) -> Keep:
        """Kept units of every axis that shrinks."""
        return dict(self.plan.keep)

    @property
    def experts_per_token(self) -> int | None:
        """Experts that a token is sent to; None: as many as before."""
        return self.plan.after.get(CHOSEN_EXPERTS)

    @property
    def merge(self) -> HeadMerge | None:
        """What query heads that go leave in those that stay."""
        return self.plan.merge

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

    @property
    def result(self) -> Mapping[str, int]:
        """The plan's widths, and all layers."""
        return {**self.plan.after, "layers": self.plan.before["layers"]}


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

    @property
    def experts_per_token(self) -> int | None:
        """As many as before."""
        return None

    @property
    def merge(self) -> HeadMerge | None:
        """No head goes."""
        return None


def causal_lm_in(module: nn.Module, at: str | None = None) -> Any:
    """The Hugging Face model that a module is or holds.

    Args:
        module: the module.
        at: path of the model in it; None: the only one.

    Raises:
        ValueError: there is none at that path, or more than one; or adapters are attached to it.
    """
    holder = type(module).__name__
    if at is not None:
        try:
            module = module.get_submodule(at)
        except AttributeError as error:
            raise ValueError(f"{holder} has no module {at!r}") from error
    found = hugging_face_models(module)
    if not found:
        raise ValueError(f"{holder} holds no Hugging Face model" + (f" at {at!r}" if at else ""))
    if len(found) > 1:
        names = ", ".join(found)
        raise ValueError(
            f"{holder} holds {len(found)} Hugging Face models ({names}); say which one, as in "
            f"at={next(iter(found))!r}"
        )
    if any(type(part).__module__.partition(".")[0] == "peft" for part in module.modules()):
        raise ValueError(_ADAPTERS.format(holder))
    (model,) = found.values()
    return model


def hugging_face_models(module: nn.Module) -> dict[str, Any]:
    """The Hugging Face models in a module by their paths, without those that are a part of another one."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{other}.") or other == "" for other in found)
        if isinstance(part, transformers.PreTrainedModel) and not inside:
            found[name] = part
    return found


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
        trust_remote_code=False, attn_implementation=model.config._attn_implementation,
    )  # fmt: skip
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys")}
    if any(wrong.values()):
        raise ValueError(f"the pruned {type(model).__name__} does not load strictly: {wrong}")
    return built
