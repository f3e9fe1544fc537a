"""lm-eval's back ends beside a model in this process: vLLM, and servers that speak OpenAI's completions."""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.gguf_weights import is_gguf
from nemo_minitron.evaluation.lm_eval import library
from nemo_minitron.evaluation.vllm_device import misplaced
from nemo_minitron.security.masking import masked
from nemo_minitron.security.plain_text import plain

_ALL = "all"
_WHERE = "evaluate.servers"
_SECONDS = 30.0


def check_backend(
    backend: str, servers: Mapping[str, str], folders: Mapping[str, Path], device: str = "auto"
) -> None:
    """Refuses a back end that is not there, before anything is measured.

    Args:
        backend: as in ``evaluate``.
        servers: likewise.
        folders: model to its folder.
        device: as in ``evaluate``.

    Raises:
        ValueError: vLLM is not installed, does not read a model or computes elsewhere, a model has no
            server, or a server does not answer or serves something else.
    """
    models = list(folders)
    if backend == "vllm":
        _check_vllm(folders, device)
    if backend != "openai":
        if servers:
            raise ValueError(f"{_WHERE}: are asked by evaluate.backend=openai, found {backend}")
        return
    missing = [package for package in ("aiohttp", "tenacity", "requests") if not find_spec(package)]
    if missing:
        raise ValueError(
            f"evaluate.backend=openai: needs {', '.join(missing)}; pip install 'lm-eval[api]'"
        )
    for name in servers:
        if name not in (*models, _ALL):
            raise ValueError(
                f"{_WHERE}.{plain(name, 40)}: no such model here; there are: {', '.join(models)}, and all"
            )
    for name in models:
        served_model(address_of(servers, name), name)


def _check_vllm(folders: Mapping[str, Path], device: str) -> None:
    if find_spec("vllm") is None:
        raise ValueError(
            "evaluate.backend=vllm: vLLM is not installed here; pip install vllm (for a GPU), or use hf"
        )
    try:
        version("vllm")
    except PackageNotFoundError as error:
        found = ", ".join(packages_distributions().get("vllm", [])) or "a folder"
        raise ValueError(
            f"evaluate.backend=vllm: vLLM is installed here as {found}, and lm-eval asks for the version of "
            "a package that is called vllm; install that, or use hf"
        ) from error
    if said := misplaced(device, torch.cuda.is_available(), version("vllm")):
        raise ValueError(f"evaluate.device={device}: with evaluate.backend=vllm {said}")
    for name, folder in folders.items():
        if is_gguf(folder):
            raise ValueError(
                f"evaluate.backend=vllm: the weights of {name} lie in a GGUF file, which vLLM does not read "
                "by config.json; use hf, which reads them as bfloat16"
            )


def address_of(servers: Mapping[str, str], model: str) -> str:
    """The address of the server that a model of the workspace is asked through.

    Raises:
        ValueError: it has none.
    """
    for name in (model, _ALL):
        if name in servers:
            return servers[name].rstrip("/")
    raise ValueError(
        f"{_WHERE}: no address for {model}; add +{_WHERE}.{model}=http://HOST:PORT/v1 (or .all, of a server "
        "that serves every model by its name)"
    )


def served_model(address: str, model: str) -> str:
    """The id by which a server serves a model: the one that it lists, or of several the model's own name.

    Raises:
        ValueError: it does not answer, or serves no such model.
    """
    shown = masked(address)
    key = os.environ.get("OPENAI_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"{_WHERE}: expected http://HOST:PORT/v1, found {shown!r}")
    if "@" in urllib.parse.urlsplit(address).netloc:
        raise ValueError(
            f"{_WHERE}: {shown}: names and passwords are not sent; give the server's key by OPENAI_API_KEY"
        )
    try:
        request = urllib.request.Request(f"{address}/models", headers=headers)  # noqa: S310  see above
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310
            listed = json.loads(answer.read())["data"]
        ids = [str(each["id"]) for each in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = plain(str(error) or type(error).__name__, 120)
        raise ValueError(
            f"{_WHERE}: {shown}/models does not list models as OpenAI's servers do: {reason}"
        ) from error
    if len(ids) == 1:
        return ids[0]
    if model in ids:
        return model
    raise ValueError(
        f"{_WHERE}: {shown} serves {plain(', '.join(ids) or 'nothing', 120)}; expected one model, or one "
        f"that is called {model}"
    )


def server_lm(
    address: str, model: str, tokenizer: Path, positions: int, batch_size: int, seed: int
) -> Any:
    """lm-eval's client of a server that speaks OpenAI's completions, by token ids.

    A text begins as its tokenizer begins it, once, as lm-eval has it for a model in this process and for
    vLLM; its client leaves the beginning-of-sequence token out.

    Args:
        address: of the server, with /v1.
        model: name of the model in the workspace.
        tokenizer: folder with its tokenizer.
        positions: how many tokens it reads at most.
        batch_size: prompts per request.
        seed: of draws.
    """
    library()
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.models.utils import has_bos_prefix

    class Client(LocalCompletionsAPI):  # type: ignore[misc]  # lm-eval has no types
        begins = True

        def tok_encode(
            self, string: Any, left_truncate_len: int | None = None,
            add_special_tokens: bool | None = None, **_: Any,
        ) -> Any:  # fmt: skip
            if not isinstance(string, str):  # prompts to write behind, which lm-eval gives none
                return [self.tok_encode(text, left_truncate_len) for text in string]
            begins = self.begins if add_special_tokens is None else add_special_tokens
            begins = begins and not has_bos_prefix(string, self.tokenizer.bos_token)
            encoded = self.tokenizer(string, add_special_tokens=begins, verbose=False)["input_ids"]
            return encoded[-left_truncate_len:] if left_truncate_len else encoded

        def loglikelihood_rolling(self, *requests: Any, **named: Any) -> Any:
            self.begins = False  # lm-eval puts the token before each window itself
            try:
                return super().loglikelihood_rolling(*requests, **named)
            finally:
                self.begins = True

    return Client(
        base_url=f"{address}/completions", model=served_model(address, model), tokenizer=str(tokenizer),
        tokenizer_backend="huggingface", max_length=positions, batch_size=batch_size, seed=seed,
    )  # fmt: skip


def vllm_lm(folder: Path, tokenizer: Path, dtype: str, batch_size: int) -> Any:
    """lm-eval's vLLM of a model folder."""
    library()
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(
        pretrained=str(folder), tokenizer=str(tokenizer), dtype=dtype, batch_size=batch_size
    )


def end_vllm(lm: Any) -> None:
    """Ends vLLM's processes, which hold the device's memory and stay when nothing refers to them any more."""
    lm.model.llm_engine.engine_core.shutdown()
