"""transformers: tries what an export must be able to do on a tiny model of the source's own settings.

A setting that a plain ``generate`` or ``save_pretrained`` refuses would else be found out after the
training.
"""

import itertools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.checkpoints.set_aside import GENERATION_CONFIG, TOKENIZER_CONFIG
from nemo_minitron.checkpoints.side_files import TOKENIZER_FILES, copy_side_files
from nemo_minitron.families import Architecture, architecture_of, check_sizes, with_text
from nemo_minitron.models.causal_lm import check_attention, load_model
from nemo_minitron.models.config_trial import config_object, culprit, not_built, reason
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.slice_wrapper import check_surroundings

LARGEST = 200_000_000
"""Parameters of a model that is tried within seconds and 2 GB of memory; a larger one is not."""


def check_builds(folder: Path, model: Architecture) -> None:
    """Builds a layer of each kind, with its own widths, without memory.

    Raises:
        ValueError: transformers refuses the config.json; the message names its key where the error
            does.
    """
    check_attention(folder, model.config)
    try:
        with torch.device("meta"):
            _made(_config(_short(model)))
    except Exception as error:  # whatever transformers' validators and layers raise
        raise not_built(folder, model.config, error, _builds) from error


def _builds(config: dict[str, Any]) -> bool:
    try:
        with torch.device("meta"):
            _made(_config(_short(architecture_of(config))))
    except Exception:
        return False
    return True


def check_whole(checkpoint: Checkpoint) -> None:
    """Checks a multimodal model's other parts: their widths, and how many numbers transformers has of them.

    Raises:
        ValueError: they could not go into an export as they are.
    """
    check_surroundings(checkpoint)
    around = checkpoint.around
    assert around is not None, "check_surroundings has looked"
    # ties written out: transformers' defaults are not always the model's own
    same = checkpoint.config
    written = with_text(around.wrapper, around.config, same, same, checkpoint.architecture.sizes)
    try:
        with torch.device("meta"):
            whole = transformers.AutoModelForImageTextToText.from_config(
                config_object(written), trust_remote_code=False
            )
    except Exception as error:  # whatever transformers' validators and layers raise
        raise not_built(checkpoint.folder, around.config, error) from error
    tensors = {id(tensor): tensor for tensor in whole.state_dict(keep_vars=True).values()}
    asked = sum(tensor.numel() for tensor in tensors.values())
    held = [*around.entries.values(), *checkpoint.entries.values()]
    found = sum(math.prod(entry.shape) for entry in held)
    if asked != found:
        raise ValueError(
            f"{checkpoint.folder}: holds {found:,} numbers, and {type(whole).__name__} of transformers "
            f"{transformers.__version__} has {asked:,}; load it there and save it again"
        )


def try_export(folder: Path, model: Architecture) -> None:
    """Saves a random tiny model of these settings, loads it, and generates a token as a card shows it.

    Args:
        folder: the source, with its tokenizer and its generation_config.json.
        model: its architecture.

    Raises:
        ValueError: a setting stops it; the message names the file and the key where the error does.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        try:
            with torch.random.fork_rng(devices=[]):
                made = _made(_config(smallest(model)))
        except Exception:  # small widths are this module's choice: no fault of the source
            return
        try:
            made.save_pretrained(work)
        except Exception as error:
            raise not_built(folder, model.config, error) from error
        copy_side_files(folder, work)
        try:
            _try_folder(work)
        except Exception as error:
            raise ValueError(
                f"{_blamed(folder, work, error)}; an export would not work with plain transformers"
            ) from error


def _try_folder(work: Path) -> None:
    loaded = load_model(work)
    loaded.save_pretrained(work / "again")  # as a student is saved: with these settings
    if any((work / file).is_file() for file in TOKENIZER_FILES):
        _generate(loaded, work)


def _blamed(folder: Path, work: Path, error: Exception) -> str:
    """File and key that keep a small model in ``work`` from working, as far as one key does."""
    for name in (GENERATION_CONFIG, TOKENIZER_CONFIG, "config.json"):
        path = work / name
        if not path.is_file():
            continue
        content = path.read_bytes()

        def works(settings: dict[str, Any], path: Path = path) -> bool:
            path.write_text(json.dumps(settings), encoding="utf-8")
            try:
                _try_folder(work)
            except Exception:
                return False
            return True

        try:
            settings = json.loads(content)
        except (ValueError, RecursionError) as damage:
            return f"{folder / name}: {reason(damage)}"
        if not isinstance(settings, dict):
            return f"{folder / name}: expected a JSON object"
        key = culprit(settings, works, error)
        path.write_bytes(content)
        if key is not None:
            return f"{folder / name}: {key}"
    return f"{folder}: its settings or its tokenizer: {reason(error)}"


def _config(model: Architecture) -> Any:
    return config_object(both_spellings(model.config))


def _made(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _generate(model: Any, work: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(work, trust_remote_code=False)
    inputs = tokenizer("The", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        outputs = model.generate(**inputs, max_length=length + 1)
    assert outputs.shape[1] == length + 1, "generate produced no token"
    tokenizer.decode(outputs[0], skip_special_tokens=True)


_TABLES = ("layer_channels",)
"""Fixed axes along which a table has an entry for each token of the vocabulary and each layer."""


def smallest(model: Architecture) -> Architecture:
    """A model of the same kind with few layers, and about the least widths that its family allows."""
    short = _short(model)
    axes = [
        name for name in (*model.prunable, *_TABLES) if name != "layers" and name in model.present
    ]
    together = [pair for count in (1, 2) for pair in itertools.combinations(axes, count)]
    sizes, shrinks = dict(short.sizes), True
    while shrinks:
        halves = (_halved(model, sizes, names) for names in together)
        found = next((half for half in halves if half is not None), None)
        sizes, shrinks = found or sizes, found is not None
    return short.resized(sizes)


def _short(model: Architecture) -> Architecture:
    """The model with one layer of each kind; whole where it cannot be cut so."""
    if "layers" not in model.prunable:
        return model
    kinds = [layers[0] for axis, layers in model.present.items() if layers and axis != "hidden"]
    try:
        return Cut(model, {}, tuple(sorted({0, *kinds}))).result
    except ValueError:
        return model


def _halved(
    model: Architecture, sizes: Mapping[str, int], names: Sequence[str]
) -> dict[str, int] | None:
    """The sizes with some of them halved, unless one is odd or small or the family refuses the result."""
    if any(sizes[name] % 2 or sizes[name] < 8 for name in names):
        return None
    half = {**sizes, **{name: sizes[name] // 2 for name in names}}
    try:
        check_sizes(model.family, half, "here")
    except ValueError:
        return None
    return half
