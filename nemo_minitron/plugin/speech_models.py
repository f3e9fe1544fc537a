"""NeMo's speech language models (``nemo.collections.speechlm2``): an LM whose parts lie around it.

SALM takes the embedding out of its Hugging Face LM; the Duplex models the head, too. What they feed
into the LM's hidden states, and read of them, has their width. Nothing of NeMo is imported here,
for those classes need packages of their own: what is known is their shape.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from nemo_minitron.families import Family, family_of
from nemo_minitron.losses.projection import Projection
from nemo_minitron.models.causal_lm import decoder_of, divided, projection_of

_GIVE = ("perception.proj", "embed_audio_tokens", "embed_asr_tokens")
"""Modules whose outputs are added to, or stand among, the embeddings."""
_READ = ("audio_head", "asr_head")
"""Modules that read the last hidden states."""
_APART = ("perception", "audio_codec")
"""Modules with widths of their own, but for what is named above."""


def is_speech_model(module: nn.Module) -> bool:
    """Whether a module keeps the embedding of the LM in ``llm`` beside it."""
    llm, embedding = getattr(module, "llm", None), getattr(module, "embed_tokens", None)
    return isinstance(llm, transformers.PreTrainedModel) and isinstance(embedding, nn.Embedding)


@contextlib.contextmanager
def put_together(module: Any) -> Iterator[Any]:
    """The causal LM of a speech model, with the parts that lie outside of it for the while.

    Raises:
        ValueError: its family is not supported.
    """
    llm = module.llm
    family = family_of(llm.config.to_dict(), type(llm).__name__)
    model = llm
    if llm.base_model is llm:  # a decoder, whose head lies beside it
        with torch.device("meta"):
            model = getattr(transformers, family.architecture)(llm.config)
        setattr(model, family.modules["decoder"], llm)
        model.set_output_embeddings(module.lm_head)
    decoder = decoder_of(model, family)
    name = _embedding_name(family)
    decoder.add_module(name, module.embed_tokens)
    try:
        yield model
    finally:
        delattr(decoder, name)


def _embedding_name(family: Family) -> str:
    """What the decoder's embedding is called: the first row that has the vocabulary."""
    row = next(row.pattern for row in family.rows if "vocab" in str(row.dims))
    return row.removesuffix(".weight").rpartition(".")[2]


def cut_along(module: nn.Module, kept_H: Tensor, hidden: int) -> None:
    """Cuts what feeds the LM's hidden states, and what reads them, as the LM was cut.

    Args:
        module: the speech model, whose LM and embedding have been cut.
        kept_H: the channels that stay.
        hidden: how many there were.
    """
    for place, outputs in _around(module, hidden):
        _cut(place, kept_H, outputs)
    config = getattr(module, "cfg", None)
    perception = config.get("perception") if isinstance(config, DictConfig) else None
    if perception is not None and "output_dim" in perception:
        with open_dict(config):
            perception.output_dim = len(kept_H)


def check_around(module: nn.Module, hidden: int) -> None:
    """Looks whether all that has the LM's width is known.

    Raises:
        ValueError: another module has that width, or the module that feeds it cannot be determined.
    """
    _around(module, hidden)
    who = type(module).__name__
    known = [*_GIVE, *_READ, "llm", "lm_head", "embed_tokens"]
    for name, parameter in module.named_parameters():
        inside = any(name.startswith(f"{other}.") for other in [*known, *_APART])
        if not inside and hidden in parameter.shape:
            raise ValueError(
                f"{who}: {name} {list(parameter.shape)} has the LM's width {hidden}, and how to cut it is "
                "not known; use a plan that leaves hidden as it is"
            )


def _around(module: nn.Module, hidden: int) -> list[tuple[nn.Module, bool]]:
    """Layers around the LM, and whether their outputs have its width, or their inputs."""
    found: list[tuple[nn.Module, bool]] = []
    for names, outputs in ((_GIVE, True), (_READ, False)):
        for name in names:
            for part in _layers(module, name):
                width = _width(part, outputs)
                if width != hidden:
                    raise ValueError(
                        f"{type(module).__name__}: {name} is {type(part).__name__} of width {width}, "
                        f"expected the LM's {hidden}; use a plan that leaves hidden as it is"
                    )
                found.append((part, outputs))
    return found


def _layers(module: nn.Module, name: str) -> list[nn.Module]:
    try:
        part = module.get_submodule(name)
    except AttributeError:
        return []
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def _width(part: nn.Module, outputs: bool) -> int | None:
    if isinstance(part, nn.Linear):
        return part.out_features if outputs else part.in_features
    return part.embedding_dim if isinstance(part, nn.Embedding) else None


def _cut(part: Any, kept_H: Tensor, outputs: bool) -> None:
    """Gives a layer's parameters fewer channels, in place."""
    rows = outputs and isinstance(part, nn.Linear)
    index = kept_H.to(part.weight.device)
    part.weight.data = part.weight.data.index_select(0 if rows else 1, index).contiguous()
    part.weight.grad = None
    if rows and part.bias is not None:
        part.bias.data, part.bias.grad = part.bias.data[index].clone(), None
    name = (
        "embedding_dim"
        if isinstance(part, nn.Embedding)
        else "out_features"
        if rows
        else "in_features"
    )
    setattr(part, name, len(index))


class SpeechTeacher:
    """A whole speech model as the teacher of one: it hears the same batch, through its own perception.

    Attributes:
        module: the model.
        model: its LM.
    """

    def __init__(self, module: Any) -> None:
        """Takes the model.

        Raises:
            ValueError: it is not of SALM's shape: an LM with its head in ``llm``.
        """
        check_taught(module)
        self.module = module.eval().requires_grad_(False)
        self.model = module.llm

    def __call__(self, family: Family, batch: Mapping[str, Any]) -> Projection:
        """Its last hidden states on a batch, [batch x positions, hidden], and its head."""
        self.module.eval()
        with torch.no_grad():
            inputs = self.module.prepare_inputs(batch)
            hidden_BSH = decoder_of(self.model, family)(
                inputs_embeds=inputs["input_embeds"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).last_hidden_state
            hidden_TH = divided(self.model, family, hidden_BSH).flatten(0, 1)
            return projection_of(self.model, family, hidden_TH)


def check_taught(module: Any) -> None:
    """Looks whether a speech model can be distilled.

    Raises:
        ValueError: its LM has no head in it (Duplex: several heads read it), or it prepares no inputs.
    """
    if module.llm.base_model is module.llm or not callable(getattr(module, "prepare_inputs", None)):
        raise ValueError(
            f"KnowledgeDistillation: {type(module).__name__} is not of SALM's shape, an LM with its head in "
            "llm, and prepare_inputs with target_ids; prune it with ModelTransform, and train it with its "
            "own loss"
        )
