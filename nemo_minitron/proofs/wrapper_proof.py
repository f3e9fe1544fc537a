"""Proves the tables of multimodal models: a cut text model fits into the parts around it.

As a family's own proof, on a tiny random model: the text model alone computes what the whole one does;
after every axis was permuted, the whole model's logits of a text with an image stay as they were; and
half of it loads strictly.
"""

import inspect
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.families import Wrapper, families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.models.config_trial import config_object
from nemo_minitron.proofs.proof import TOGETHER, Finding, Row, equal, halved
from nemo_minitron.proofs.tiny_models import permutation, random_weights, tiny_config
from nemo_minitron.pruning.select import Keep, score_shape, select_units
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.slice_wrapper import CutSurroundings, check_surroundings, write_whole
from nemo_minitron.pruning.stream import write_pruned
from nemo_minitron.scoring.importance import random_scores
from nemo_minitron.workspace.manifest import write_json

WRAPPER_PROOFS = ("text alone", "permutation", "strict load")


def tiny_whole(wrapper: Wrapper, kind: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Saves a tiny random multimodal model.

    Args:
        wrapper: its table.
        kind: ``model_type`` of the text model inside.
        folder: where it goes.
        seed: seed of the weights.
        changes: values of the text model's configuration.
    """
    family = families()[wrapper.text[kind]]
    own = {**family.proofs[0], **wrapper.proof.get("text", {}), **changes}
    text = {**tiny_config(family, own), "model_type": kind}
    config = {"model_type": wrapper.model_type, "text_config": text, **wrapper.proof["config"]}
    for path, axis in wrapper.config.items():
        part, key = path.split(".")
        config[part] = {**config[part], key: text[family.axes[axis].config[0]]}
    model = transformers.AutoModelForImageTextToText.from_config(
        config_object(config), trust_remote_code=False
    )
    torch.manual_seed(seed)
    random_weights(model)
    model.save_pretrained(folder)
    return folder


def image_logits(folder: Path, wrapper: Wrapper, seed: int = 3) -> Tensor:
    """Logits of a multimodal model on a text with a random image, after a strict load."""
    model = _loaded(folder)
    generator = torch.Generator().manual_seed(seed)
    proof, config = wrapper.proof, wrapper.proof["config"]
    image_token = config.get("image_token_index", config.get("image_token_id"))
    tokens = torch.arange(2, 14)[None]
    tokens[0, 3 : 3 + proof["tokens"]] = image_token
    inputs: dict[str, Any] = {
        name: torch.randn(shape, generator=generator) for name, shape in proof["image"].items()
    }
    inputs |= {name: torch.tensor(value) for name, value in proof.get("given", {}).items()}
    inputs["mm_token_type_ids"] = (tokens == image_token).long()
    inputs["token_type_ids"] = inputs["mm_token_type_ids"]
    with torch.inference_mode():
        names = inspect.signature(model.forward).parameters
        taken = {name: value for name, value in inputs.items() if name in names}
        logits: Tensor = model(input_ids=tokens, **taken).logits
    return logits


def _loaded(folder: Path) -> Any:
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    wrong = [info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    if any(wrong):
        raise ValueError(f"{folder}: does not load strictly: {wrong}")
    return model.eval()


def prove_wrapper(wrapper: Wrapper, kind: str) -> Iterator[Finding]:
    """Proves one table around one kind of text model.

    Yields:
        A finding per proof.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = tiny_whole(wrapper, kind, work / "source")
        opened = open_checkpoint(source)
        assert opened.around is not None, "it was made as a multimodal model"
        checkpoint = replace(opened, around=replace(opened.around, wrapper=wrapper))
        check_surroundings(checkpoint)
        tokens = torch.arange(2, 26).reshape(2, 12)
        with torch.inference_mode():
            alone = load_model(source, torch.float32)(tokens).logits
            whole = _loaded(source)(input_ids=tokens).logits
        yield Finding(kind, WRAPPER_PROOFS[0], equal(whole, alone))
        family, sizes = checkpoint.family, checkpoint.architecture.sizes
        axes = [axis for axis in checkpoint.architecture.prunable if axis != "layers"]
        before = image_logits(source, wrapper)
        moved = permutation(checkpoint.architecture, axes)
        after = image_logits(cut_whole(checkpoint, moved, work / "moved"), wrapper)
        seen = not equal(before, image_logits(source, wrapper, seed=4))
        yield Finding(kind, WRAPPER_PROOFS[1], seen and equal(before, after))
        targets = halved(family, sizes, TOGETHER, checkpoint.architecture.prunable)
        scores = {
            axis: random_scores(score_shape(family, sizes, axis), seed)
            for seed, axis in enumerate(axes)
        }
        keep = select_units(family, scores, sizes, {a: targets[a] for a in axes})
        step = 2 if "layers" in checkpoint.architecture.prunable else 1
        layers = tuple(range(sizes["layers"]))[step - 1 :: step]
        half = cut_whole(checkpoint, keep, work / "half", layers)
        yield Finding(kind, WRAPPER_PROOFS[2], bool(image_logits(half, wrapper).isfinite().all()))


WRAPPER_COLUMNS = ("multimodal model", "text model", *WRAPPER_PROOFS)


def wrapper_table(chosen: Mapping[str, Wrapper]) -> tuple[Row, tuple[Row, ...], int]:
    """Proves tables of multimodal models; see ``proof_table``."""
    rows: list[Row] = []
    for name, wrapper in chosen.items():
        for kind in wrapper.text:
            try:
                found = {each.proof: each.holds for each in prove_wrapper(wrapper, kind)}
            except (ValueError, RuntimeError):  # a wrong table: the result is no model
                found = {}
            cells = ("yes" if found.get(proof) else "FAILS" for proof in WRAPPER_PROOFS)
            rows.append((name, kind, *cells))
    return WRAPPER_COLUMNS, tuple(rows), sum("FAILS" in row for row in rows)


def cut_whole(
    checkpoint: Checkpoint, keep: Keep, folder: Path, layers: tuple[int, ...] | None = None
) -> Path:
    """A cut of text model and surroundings, put together again."""
    every = tuple(range(checkpoint.architecture.sizes["layers"]))
    cut = Cut(checkpoint.architecture, keep, layers or every)
    alone = folder.with_name(f"{folder.name}-text")
    alone.mkdir()
    folder.mkdir()
    write_pruned(checkpoint, [(alone, cut)], 10**9)
    text, around = open_checkpoint(alone), CutSurroundings(checkpoint, cut)
    write_whole(text, around, folder, lambda _: torch.float32, None, 10**9)
    write_json(folder / "config.json", around.config(text.architecture))
    return folder
