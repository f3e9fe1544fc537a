"""transformers: models and tokenizers in and out of Hugging Face folders."""

import contextlib
import gc
import json
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import torch
import transformers
from torch import Tensor, nn

from nemo_minitron.checkpoints.dequantised import quantisation_of
from nemo_minitron.checkpoints.gguf_weights import is_gguf
from nemo_minitron.checkpoints.hf_config import both_spellings, raw_config, read_config
from nemo_minitron.checkpoints.set_aside import OUTPUTS, generation_settings
from nemo_minitron.checkpoints.unsupported_weights import (
    check_config,
    check_folder,
    implementations,
)
from nemo_minitron.families import Family, families, family_of, predicts, wrapper_of
from nemo_minitron.losses.projection import Projection
from nemo_minitron.models.config_trial import not_built, reason
from nemo_minitron.models.positions_in_order import positions_in_order
from nemo_minitron.models.read_here import load_read_here
from nemo_minitron.security.links import refuse_links
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.manifest import write_json

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_FLASH = ("flash_attn", "flash_attn_interface")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def free() -> None:
    """Frees the memory of models that are no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU.

    Raises:
        ValueError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r}: not available here ({str(error).splitlines()[0]})"
        ) from error
    return device


def load_model(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Any:
    """Loads a causal LM for reading: evaluation mode, no gradients wanted, every weight accounted for.

    Args:
        folder: the model.
        dtype: of its weights; ``auto`` is that of config.json.
        device: where they go; None: the CPU.
        tensors: weights in the place of those on disk, by the names on disk.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; or the folder asks for what
            is not loaded from a model (``checkpoints/unsupported_weights.py``).
    """
    check_folder(folder)
    refuse_links(folder)
    stored, config = raw_config(folder), read_config(folder)
    check_config(folder, stored)
    check_config(folder, config)
    check_attention(folder, stored)
    read_here = (
        tensors is not None
        or quantisation_of(folder, stored) is not None
        or is_gguf(folder)
        or wrapper_of(stored) is not None
    )
    plainly: dict[str, Any] = {key: key == "return_dict" for key in OUTPUTS if key in config}
    generation = generation_settings(folder)
    if generation is not None:
        plainly["generation_config"] = transformers.GenerationConfig.from_dict(generation)
    try:
        model, info = (
            load_read_here(folder, dtype, plainly, tensors)
            if read_here
            else transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                **plainly,
            )
        )
    except (KeyError, AssertionError) as error:
        raise not_built(folder, config, error) from error
    wrong = {
        kind: sorted(map(str, info[kind]))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    wrong["unexpected_keys"] = _without_predictions(config, wrong["unexpected_keys"])
    if any(wrong.values()):
        raise ValueError(
            f"{folder}: does not load strictly: "
            + "; ".join(f"{k}: {v[:3]}" for k, v in wrong.items() if v)
        )
    return model.to(device or torch.device("cpu")).eval()


def _without_predictions(config: Mapping[str, Any], names: list[str]) -> list[str]:
    """Tensors that a model does not take, without those of prediction layers: these are left out."""
    family = families().get(str(config.get("model_type")))
    layers = config.get("num_hidden_layers")
    if family is None or not isinstance(layers, int):
        return names
    return [name for name in names if not predicts(family, name, layers)]


def check_attention(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses an attention that is not installed here.

    transformers would fetch a kernel from the hub in its place, where the package kernels is.

    Raises:
        ValueError: config.json asks for one.
    """
    for key, choice in implementations(config):
        if choice.startswith("flash_attention") and not any(map(find_spec, _FLASH)):
            raise ValueError(
                f"{folder / 'config.json'}: {key}={choice!r}, and flash-attn is not installed here; install "
                "it, or remove the key"
            )


def load_layers(folder: Path, family: Family, tensors: Mapping[str, Tensor]) -> Any:
    """A causal LM made of tensors in memory, which it takes over without a copy.

    Args:
        folder: holds the model's config.json; a cut model's, where tensors of some layers only are
            given.
        family: its table.
        tensors: names on disk to weights.
    """
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architecture = getattr(transformers, family.architecture)
    loaded = architecture.from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype="auto", trust_remote_code=False
    )
    return loaded.eval()


def new_model(config: Mapping[str, Any], seed: int, where: str = "pretrain.model") -> Any:
    """A causal LM with random weights.

    Norms whose stored weight is an offset from one (LayerNorm1P) start at zero, so that their gain
    is one.

    Args:
        config: a config.json, ``model_type`` included.
        seed: seed of the weights.
        where: what an error message calls the config.

    Raises:
        ValueError: the family is not known, or transformers refuses the config.
    """
    family = family_of(config, where)
    torch.manual_seed(seed)
    try:
        entries = {key: value for key, value in config.items() if key != "model_type"}
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config["model_type"], **entries),
            trust_remote_code=False,
        ).float()
    except Exception as error:  # transformers raises whatever its validators raise
        raise ValueError(f"{where}: transformers refuses this config: {reason(error)}") from error
    if family.zero_centred_norms:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and name.endswith("norm.weight"):
                    parameter.zero_()
    return model


def stored_config(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model made from scratch: keys that its class declares, no general defaults.

    Args:
        model: the model.
        given: what the user wrote; kept whatever it is.
    """
    general = transformers.PreTrainedConfig().to_dict()
    needed = {*given, "tie_word_embeddings", "bos_token_id", "eos_token_id", "transformers_version"}
    values = model.config.to_dict()
    kept = {key: value for key, value in values.items() if key in needed or key not in general}
    return {"architectures": [type(model).__name__], "model_type": model.config.model_type, **kept}


ENTRY = "decode"
"""A method that a sharded model has been given: its decoder, with its weights gathered around it."""


def decoder_of(model: Any, family: Family) -> nn.Module:
    """The part of a causal LM that ends with the last hidden states."""
    module: nn.Module = model.get_submodule(family.modules["decoder"])
    return module


def layers_of(model: Any, family: Family) -> list[nn.Module]:
    """The layers of a causal LM, in order."""
    return list(layer_list(model, family).children())


def layer_list(model: Any, family: Family) -> nn.Module:
    """The module of a causal LM whose children are its layers."""
    path = next(tap.module for tap in family.taps["layers"])
    holder, _, _ = path.rpartition(".")
    module: nn.Module = model.get_submodule(holder)
    return module


def head_of(model: Any) -> Tensor:
    """The output projection's weight, shape [vocabulary, hidden]; the embedding's where they are tied."""
    head = model.get_output_embeddings()  # None also where the embedding was taken out
    weight: Tensor = (model.lm_head if head is None else head).weight
    # a weight that is sharded over ranks (tied to embeddings under FSDP2) is gathered
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def hidden_states(model: Any, family: Family, tokens_BS: Tensor, **more: Any) -> Tensor:
    """Input of the output projection: last hidden states, after the final norm.

    Divided or multiplied where the family does that to its logits. [batch, positions] token ids to
    [batch, positions, hidden]; ``more`` are further arguments of the decoder.
    """
    arguments = {"input_ids": tokens_BS, "use_cache": False, **more}
    decode = getattr(model, ENTRY, None) or decoder_of(model, family)
    with positions_in_order(tokens_BS, more):
        return divided(model, family, decode(**arguments).last_hidden_state)


def divided(model: Any, family: Family, hidden: Tensor) -> Tensor:
    """The decoder's last hidden states as the head gets them where the family scales its logits."""
    divisor = getattr(model.config, family.logits["divide"]) if "divide" in family.logits else 1
    factor = getattr(model.config, family.logits["multiply"]) if "multiply" in family.logits else 1
    hidden = hidden if divisor == 1 else hidden / divisor
    return hidden if factor == 1 else hidden * factor


def softcap_of(model: Any, family: Family) -> float | None:
    """The cap c of a model whose logits x are c tanh(x / c), or None."""
    cap: float | None = (
        getattr(model.config, family.logits["softcap"]) if "softcap" in family.logits else None
    )
    return cap


def projection_of(model: Any, family: Family, hidden_TH: Tensor) -> Projection:
    """What a model's logits are made of; of ``hidden_states``, flattened to [tokens, hidden]."""
    return Projection(hidden_TH, head_of(model), softcap_of(model, family))


def save_model(
    model: Any,
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    shard_size: int = 5_000_000_000,
) -> None:
    """Writes weights and config.json into a folder.

    Args:
        model: the causal LM.
        folder: an existing folder.
        config: the config.json that the model came with; carried on as it is, the dtype apart.
        weights: its weights, where the model itself holds a part of them only.
        shard_size: largest shard in bytes.
    """
    model.save_pretrained(folder, max_shard_size=shard_size, state_dict=weights)
    dtype = read_config(folder)["dtype"]
    write_json(
        folder / "config.json", both_spellings({**config, "dtype": dtype, "torch_dtype": dtype})
    )


def load_tokenizer(folder: Path, vocabulary: int | None = None) -> Any:
    """Loads a tokenizer and checks that it fits its model.

    Args:
        folder: where its files lie.
        vocabulary: size of the model's vocabulary; None: from the config.json in the same folder.

    Raises:
        ValueError: there is none, it does not load, or it has ids beyond the model's vocabulary; or
            a file is a link that leads out of the folder.
    """
    if folder.is_file():
        raise ValueError(f"{folder}: a file, expected the folder of a tokenizer")
    vocabulary = vocabulary or read_config(folder)["vocab_size"]
    refuse_links(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizer's backend raises
        said = _damaged(folder) or reason(error)
        raise ValueError(f"{folder}: no usable tokenizer: {said}") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise ValueError(
            f"{folder}: the tokenizer has no vocabulary; are its files (tokenizer.json ...) there?"
        )
    if largest >= vocabulary:
        raise ValueError(
            f"{folder}: the tokenizer does not fit the model: it has token ids up to {largest}, "
            f"the model's vocabulary has {vocabulary} entries"
        )
    return tokenizer


def _damaged(folder: Path) -> str | None:
    """The file of a tokenizer that holds no JSON object, and what it holds instead."""
    for name in _TOKENIZER_JSON:
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            return f"{name} is not valid JSON: {plain(error, 100)}"
        if not isinstance(found, dict):
            return f"{name} holds no JSON object"
    return None


_TOKENIZER_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[Any]:
    """The model in evaluation mode under inference mode (without gradients where it is sharded)."""
    was_training = model.training
    model.eval()
    try:
        with untracked(model):
            yield model
    finally:
        model.train(was_training)


def untracked(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Inference mode, or without gradients where the model is sharded."""
    # FSDP2 keeps what it gathers, and a tensor made under inference mode could not be used again
    return torch.no_grad() if hasattr(model, ENTRY) else torch.inference_mode()
