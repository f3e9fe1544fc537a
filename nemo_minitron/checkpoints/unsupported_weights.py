"""Recognises weights that are not a plain causal LM, and refuses them with a remedy."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.config_values import check_values
from nemo_minitron.checkpoints.gguf_file import SUFFIX as GGUF
from nemo_minitron.security.plain_text import plain

DEQUANTISE = (
    "dequantise it first: load it with transformers, model.dequantize(), "
    "save_pretrained in bfloat16"
)
"""What to do with quantised weights of a format that is not read here."""
_KINDS = (
    (r"\.lora_[AB]\b|\.lora_(embedding|magnitude)|\.base_layer\.", "LoRA adapter weights",
     "merge the adapter first (peft: merge_and_unload) and save the merged model"),
    (r"weight_scale(_inv)?$|\.input_scale$|\.(k|v)_scale$|activation_scale$", "fp8 block or tensor scales",
     DEQUANTISE),
    (r"\.(qweight|qzeros|g_idx|scales)$|weight_packed$|weight_zero_point$", "GPTQ/AWQ weights", DEQUANTISE),
    (r"\.(absmax|quant_map|nested_absmax|SCB|weight_format)$|quant_state", "bitsandbytes weights",
     DEQUANTISE),
    (r"_proj_(blocks|scales)$", "mxfp4 blocks", DEQUANTISE),
    (r"(^|\.)(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|mm_projector|image_newline|"
     r"vision_embed_tokens|sound_encoder)\b", "a vision or audio tower",
     "save the text model alone as a causal LM first"),
    (r"(^|\.)mtp\b|\.(eh_proj|enorm|hnorm|shared_head)\b|nextn", "multi-token prediction (MTP) layers",
     "remove them first: load the model with transformers, which leaves them out, and save_pretrained"),
)  # fmt: skip


def check_folder(folder: Path) -> None:
    """Refuses a folder that is none, or holds an adapter, or a distributed checkpoint of NeMo 2.

    Raises:
        ValueError: it does; also where a model lies beside the adapter: transformers would load the
            base model that the adapter names, from wherever that is, and the two together.
    """
    if folder.is_file() and folder.suffix != GGUF:
        raise ValueError(f"{folder}: a file; expected the folder of a model, as {folder.parent}")
    if folder.is_file():
        raise ValueError(
            f"{folder}: a file, expected a Hugging Face folder; GGUF files are taken by source.model, "
            "distill.teacher, evaluate.model, .teacher and .beside, and 'minitron size'"
        )
    if (folder / "adapter_config.json").is_file():
        kind = "beside a model" if (folder / "config.json").is_file() else "not a model"
        raise ValueError(
            f"{folder}: a LoRA adapter, {kind} (adapter_config.json); merge it into its base model first "
            "(peft: merge_and_unload) and save the merged model, or remove the adapter's files"
        )
    distributed = (folder / "weights").is_dir() or any(folder.glob("*.distcp"))
    if distributed and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: a distributed checkpoint of NeMo 2, not a Hugging Face folder; where NeMo 2 is "
            f"installed: nemo llm export path={folder} target=hf output_path=FOLDER, then source.model=FOLDER"
        )


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses a config.json that declares other weight files, code on the hub, or values that are none.

    transformers takes ``attn_implementation: owner/kernel`` for a kernel, which it fetches and
    runs.

    Raises:
        ValueError: it does; the message names the key.
    """
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"{folder / 'config.json'}: transformers_weights names other files than those that are read "
            "here; remove the key, or save the model again with transformers"
        )
    for key, value in implementations(config):
        if "/" in value:
            raise ValueError(
                f"{folder / 'config.json'}: {key}={plain(value, 80)!r} is code on the hub, which is never "
                "run; remove the key"
            )
    check_values(folder, config)


def implementations(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of a configuration, at any depth, that choose an implementation of layers, with their choices."""
    waiting: list[Any] = [config]
    while waiting:  # not by recursion: a stranger's file may be nested deeply
        part = waiting.pop()
        for key, value in part.items() if isinstance(part, Mapping) else enumerate(part):
            if str(key).lstrip("_").startswith(_IMPLEMENTATIONS):
                named = value.values() if isinstance(value, Mapping) else [value]
                yield from ((str(key), each) for each in named if isinstance(each, str))
            elif isinstance(value, Mapping | list):
                waiting.append(value)


_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_names(folder: Path, unknown: Iterable[str], layers: int) -> None:
    """Refuses tensors that the family's table lacks, if their names say what they are.

    Args:
        folder: the checkpoint.
        unknown: names of tensors that the family's table does not expect.
        layers: layers of the model; tensors of further ones are prediction layers.

    Raises:
        ValueError: one of them is recognised; the message says how many and what to do.
    """
    names = sorted(unknown)
    for pattern, kind, advice in _KINDS:
        found = [name for name in names if re.search(pattern, name)]
        if found:
            raise ValueError(
                f"{folder}: holds {kind} ({len(found)} tensors, as {plain(found[0], 200)}); {advice}"
            )
    beyond = [
        n for n in names if (m := re.search(r"\blayers\.(\d{1,9})\.", n)) and int(m[1]) >= layers
    ]
    if beyond:
        kind, advice = _KINDS[-1][1:]
        raise ValueError(
            f"{folder}: {len(beyond)} tensors of layers beyond the {layers} of config.json, as "
            f"{plain(beyond[0], 200)}: "
            f"{kind}, most likely; {advice}"
        )


def check_renamed(folder: Path, unknown: Iterable[str], missing: Iterable[str]) -> None:
    """Refuses weights whose names differ from those of a causal LM by a prefix, and those of a classifier.

    Args:
        folder: the checkpoint.
        unknown: names of tensors that the family's table does not expect.
        missing: names that it expects and that are not there.

    Raises:
        ValueError: they are; the message names the prefix and what to do.
    """
    have, want = set(unknown), sorted(missing)
    for one in sorted(have)[:50]:
        for other in want:
            longer, shorter = (one, other) if len(one) > len(other) else (other, one)
            prefix = longer.removesuffix(shorter)
            if prefix in ("", longer) or not prefix.endswith("."):
                continue
            extra = longer == one
            pairs = [name for name in want if _renamed(name, prefix, extra) in have]
            if 2 * len(pairs) <= len(want):
                continue
            what = (
                f"carry the prefix {plain(prefix, 80)!r}"
                if extra
                else f"lack the prefix {prefix!r}"
            )
            raise ValueError(
                f"{folder}: the names of {len(pairs)} tensors {what}, as {plain(one, 120)} for {other}; "
                "load the causal LM (AutoModelForCausalLM) and save_pretrained it, or rename the tensors"
            )
    heads = [name for name in sorted(have) if re.search(r"(^|\.)(score|classifier)\.", name)]
    if heads:
        raise ValueError(
            f"{folder}: a classifier ({plain(heads[0], 80)}), which has no head over the vocabulary; save "
            "the causal LM that it was made from"
        )


def _renamed(name: str, prefix: str, extra: bool) -> str:
    return prefix + name if extra else name.removeprefix(prefix)
