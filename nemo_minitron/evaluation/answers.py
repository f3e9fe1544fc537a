"""How a model is asked in lm-eval's tasks: as in a chat, how often, and through which back end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.config.evaluate_config import EvaluateConfig
from nemo_minitron.workspace.manifest import digest


@dataclass(frozen=True)
class Answers:
    """How questions are asked, and answers drawn.

    Attributes:
        chat: whether questions are messages of the chat template, examples earlier turns.
        backend: ``hf``, ``vllm`` or ``openai``.
        repeats: answers drawn to each question of a task in which the model writes; 1: as the task says.
        temperature: of the draws.
        seed: of the draws.
    """

    chat: bool = False
    backend: str = "hf"
    repeats: int = 1
    temperature: float = 1.0
    seed: int = 0

    def arguments(self, draw: int) -> dict[str, Any]:
        """Arguments of ``simple_evaluate`` for one draw; none where tasks are asked as they are."""
        asked: dict[str, Any] = {}
        if self.chat:
            asked |= {"apply_chat_template": True, "fewshot_as_multiturn": True}
        if self.repeats > 1:
            drawn = {"do_sample": True, "temperature": self.temperature}
            if self.backend == "vllm":
                drawn["seed"] = self.seed + draw
            asked |= {"gen_kwargs": drawn, "torch_random_seed": self.seed + draw}
        return asked

    def decides(self) -> dict[str, Any]:
        """What of it decides a measurement, where it is not as tasks are asked by default."""
        found: dict[str, Any] = {}
        if self.chat:
            found["chat"] = True
        if self.backend != "hf":
            found["backend"] = self.backend
        if self.repeats > 1:
            found |= {
                "repeats": self.repeats, "temperature": self.temperature, "seed": self.seed,
            }  # fmt: skip
        return found


def answers_of(settings: EvaluateConfig) -> Answers:
    """How a configuration asks."""
    return Answers(
        settings.chat, settings.backend, settings.repeats, settings.temperature, settings.seed
    )


def settings_without_defaults(settings: Mapping[str, Any], answers: Answers) -> dict[str, Any]:
    """The keys of ``evaluate`` that decide a report: of how it asks what is not the default."""
    own = ("chat", "backend", "servers", "repeats", "temperature", "seed", "teacher", "beside")
    asked = {key: settings[key] for key in answers.decides()}
    if settings["beside"]:  # by whatever folders: these are inputs
        asked["beside"] = list(settings["beside"])
    return {key: value for key, value in settings.items() if key not in own} | asked


def stop_texts(folder: Path, tokenizer: Any) -> list[str]:
    """The texts of the tokens with which a model ends an answer, by its own files.

    Source: transformers' ``eos_token_id`` in generation_config.json, else in config.json: a number or
    a list of them, such as the ends of a text and of a turn.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        known = [ids] if isinstance(ids, int) else ids if isinstance(ids, list) else []
        texts = [tokenizer.decode([each]) for each in known if isinstance(each, int)]
        if texts:
            return [text for text in texts if text]
    return []


def with_stops(lm: Any, stops: Sequence[str]) -> Any:
    """A model of lm-eval's that ends every answer at these texts too, beside those of its task."""
    plain = lm.generate_until

    def generate_until(requests: list[Any], *more: Any, **named: Any) -> Any:
        for request in requests:
            context, given, *rest = request.args
            until = given.get("until") or []
            own = [until] if isinstance(until, str) else list(until)
            added = [text for text in stops if text not in own]
            request.arguments = (context, {**given, "until": [*own, *added]}, *rest)
        return plain(requests, *more, **named)

    lm.generate_until = generate_until
    return lm


def check_chat(folder: Path, tokenizer: Any) -> None:
    """Refuses to chat with a model that has no chat template.

    Raises:
        ValueError: its tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"evaluate.chat: {folder}: its tokenizer has no chat template (chat_template.jinja, or "
            "chat_template in tokenizer_config.json); add one, or leave evaluate.chat out"
        )


def server_print(address: str) -> str:
    """What stands for a server's address in the name of a measurement: it may hold a password."""
    return digest(address)[:16]
