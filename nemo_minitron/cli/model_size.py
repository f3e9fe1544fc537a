"""What a model costs: parameters, FLOPs, cache, memory of a training; from config.json alone."""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.cli.family_tables import split_own_tables
from nemo_minitron.cli.tables import print_table


def size(args: argparse.Namespace) -> int:
    """``minitron size``: what a model costs, from its config.json alone."""
    from nemo_minitron.families import use_tables
    from nemo_minitron.pruning.cost import model_size
    from nemo_minitron.pruning.serving import check_serving, serving_notes

    own, words = split_own_tables(args.sizes)
    serve, wanted = _split_serve(words)
    if own:
        use_tables(own)
    model = _architecture(args.model)
    model.check_lists()
    sizes = _asked_sizes(model, wanted)
    check_serving(model, sizes, serve, "size: serve")
    for note in serving_notes(model, sizes, serve):
        print(f"note: {note}", file=sys.stderr)
    if args.context < 1:
        raise ValueError(f"size: --context: expected at least 1, found {args.context}")
    if sizes["layers"] != model.sizes["layers"] and model.family.axes["layers"].fixed:
        raise ValueError(
            f"size: layers: {model.family.model_type} keeps all of them (docs/families.md)"
        )
    if sizes["layers"] < model.sizes["layers"]:  # of unlike layers, the first
        model = _first_layers(model, sizes["layers"])
    model = model.resized(sizes)
    cost = model_size(model, args.context)
    memory = _training_memory(args, model) if args.training else {}
    facts: dict[str, Any] = {**sizes, **asdict(cost)} | ({"training": memory} if memory else {})
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    rows = [(axis, f"{value:,}") for axis, value in sizes.items()]
    rows += [
        ("parameters", f"{cost.parameters:,} ({cost.parameters / 1e9:.3f} B)"),
        ("without embeddings", f"{cost.non_embedding:,} ({cost.non_embedding / 1e9:.3f} B)"),
        ("active per token", f"{cost.active:,} ({cost.active / 1e9:.3f} B)"),
        (f"FLOPs per token at {cost.context} tokens", f"{cost.flops_per_token:,}"),
        (
            f"KV-cache bytes per token ({cost.cache_bytes} bytes each)",
            f"{cost.kv_bytes_per_token:,}",
        ),
    ]
    rows += [
        (f"training, each rank: {part}", f"{value / 2**30:,.1f} GiB")
        for part, value in memory.items()
    ]
    print_table(("", str(args.model)), tuple(rows))
    return 0


def _asked_sizes(model: Any, words: list[str]) -> dict[str, int]:
    """A model's sizes with those that were asked for, and with what follows from these as in a plan.

    Raises:
        ValueError: no axis of the model, no size, or the size of an axis that others decide.
    """
    from nemo_minitron.families import check_sizes
    from nemo_minitron.pruning.select import followed

    asked = {}
    for text in words:
        axis, _, value = text.partition("=")
        if axis not in model.sizes or not value.isdecimal() or int(value) < 1:
            raise ValueError(
                f"size: expected AXIS=SIZE with an axis of {', '.join(model.sizes)}, found {text!r}"
            )
        asked[axis] = int(value)
    sizes = followed(model.family, {**model.sizes, **asked})
    check_sizes(model.family, sizes, "size")
    layers = {"layers": model.sizes["layers"]}  # of other layers it has other lists, too
    counted = {**model.resized({**sizes, **layers}).sizes, "layers": sizes["layers"]}
    for axis, value in asked.items():
        if decided := {sizes[axis], counted[axis]} - {value}:
            follows = model.family.axes[axis].follows
            raise ValueError(
                f"size: {axis}: other sizes make it {min(decided)}{f' ({follows})' if follows else ''}, "
                f"found {value}; leave it out, and set those"
            )
    return counted


def _first_layers(model: Any, count: int) -> Any:
    """A model cut to its first layers, with a note where others make another size, as they do in a plan."""
    from nemo_minitron.pruning.cost import model_size
    from nemo_minitron.pruning.slice import Cut

    layers = model.sizes["layers"]
    first, last = (
        Cut(model, {}, tuple(kept)).result for kept in (range(count), range(layers - count, layers))
    )
    counted = [model_size(one).parameters for one in (first, last)]
    if counted[0] != counted[1]:
        print(
            f"note: layers={count}: the first are counted, and the model's layers differ; the last make "
            f"{counted[1] - counted[0]:+,} parameters, and a plan keeps those that its scores name",
            file=sys.stderr,
        )
    return first


def _split_serve(words: list[str]) -> tuple[list[str], list[str]]:
    """The runtimes among a command's words (``serve=[gguf,tp:4]``), and the other words."""
    prefix = "serve="
    named = [word.removeprefix(prefix).strip("[]") for word in words if word.startswith(prefix)]
    runtimes = [name.strip() for text in named for name in text.split(",") if name.strip()]
    return runtimes, [word for word in words if not word.startswith(prefix)]


def _architecture(model: str) -> Any:
    """A model as its family's table and its config.json, or the metadata of its GGUF file, describe it."""
    from nemo_minitron.checkpoints.hf_config import read_config
    from nemo_minitron.families import architecture_of

    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from nemo_minitron.checkpoints.gguf_families import config_of
        from nemo_minitron.checkpoints.gguf_file import read_gguf

        return architecture_of(config_of(read_gguf(path), model), model)
    folder = _config_folder(model)
    return architecture_of(read_config(folder), str(folder / "config.json"))


def _config_folder(model: str) -> Path:
    """Where a model's config.json lies; a hub model's is fetched."""
    path = Path(model).expanduser()
    if path.name == "config.json":
        path = path.parent
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        from nemo_minitron.release.hub_download import download_config

        return download_config(model)
    return path


def _training_memory(args: argparse.Namespace, model: Any) -> dict[str, int]:
    """Bytes on each rank, by what they are for."""
    from nemo_minitron.training.memory_estimate import Launch, training_footprint

    try:
        launch = Launch(
            args.ranks, args.shard, args.tensor_parallel, args.precision, args.tokens,
            args.activation_checkpointing, args.teacher_shard,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"size: --{error}") from error
    teacher = None
    if args.teacher:
        teacher = _architecture(args.teacher)
    found = training_footprint(model, launch, teacher)
    return {**asdict(found), "total": found.total}
