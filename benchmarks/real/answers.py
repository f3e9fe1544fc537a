"""What models answer in the chat template, and how fast they write: greedy, one sequence at a time."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.evaluation.generation import continue_greedily
from nemo_minitron.models.causal_lm import frozen, load_model, load_tokenizer, pick_device

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "What is 2 + 3?",
    "Who wrote Moby-Dick?",
    "Write one sentence about the sea.",
)
_WORDS = 40
"""Tokens of an answer."""
_PROMPT, _WRITTEN, _ROUNDS = 8, 16, 16


def answers(folders: Mapping[str, Path], device: str) -> dict[str, list[str]]:
    """The answers of each model to the fixed questions, first lines of prose where it has no template."""
    found = {}
    for name, folder in folders.items():
        tokenizer = load_tokenizer(folder)
        with frozen(load_model(folder, "bfloat16", pick_device(device))) as model:
            found[name] = [_answer(model, tokenizer, question) for question in QUESTIONS]
    return found


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        prompt = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")
    prompt = {name: prompt[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        ids = model.generate(**prompt, max_new_tokens=_WORDS, do_sample=False)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def decode_speed(
    folders: Mapping[str, Path], text: str, device: str
) -> dict[str, dict[str, float]]:
    """How fast each model writes behind the same text; they take turns, the best of many short rounds counts.

    Args:
        folders: model to its folder.
        text: what they continue; a few tokens of it are the prompt.
        device: as in ``evaluate.device``.

    Returns:
        Model to ``tokens_per_second`` and ``characters_per_second``, the latter by how many characters of
        the text a token of its tokenizer stands for.
    """
    ready = {}
    for name, folder in folders.items():
        tokenizer, model = (
            load_tokenizer(folder),
            load_model(folder, "bfloat16", pick_device(device)),
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ready[name] = (model.eval(), torch.tensor([ids[:_PROMPT]]), len(text) / len(ids))
    best = dict.fromkeys(ready, float("inf"))
    for turn in range(_ROUNDS + 1):
        for name, (model, prompt, _) in ready.items():
            start = time.perf_counter()
            with torch.inference_mode():
                continue_greedily(model, prompt, _WRITTEN)
            if turn:  # the first round only warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return {
        name: {
            "tokens_per_second": round(_WRITTEN / best[name], 2),
            "characters_per_second": round(_WRITTEN / best[name] * characters, 2),
        }
        for name, (_, _, characters) in ready.items()
    }
