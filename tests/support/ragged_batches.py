"""Steps over rows of several lengths, as a script takes them.

A rank of one: python -m tests.support.ragged_batches OUT MODEL STRATEGY.
"""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from nemo_minitron import MinitronModel
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.training.strategies import sharding_strategy

RATE = 0.5
FOUR = (33, 5, 9, 21)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip


def rows_of(*lengths):
    """Random rows; of a negative length: one that is read and not learned, of negative ids ~id."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 60, (abs(length),), generator=draw) for length in lengths]
    return [~row if length < 0 else row for row, length in zip(rows, lengths, strict=True)]


def collate(part):
    """Pads to the longest, as transformers' collators do."""
    width = max(map(len, part))
    given = torch.stack([F.pad(row, (0, width - len(row))) for row in part])
    ids = torch.where(given < 0, ~given, given)
    mask = torch.stack([torch.arange(width) < len(row) for row in part]).long()
    labels = ids.masked_fill((mask == 0) | (given < 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def fitted(model, rows, **trainer):
    """One epoch by plain gradient descent, a row in a micro-batch."""
    lightning = Trainer(**{**QUIET, "max_epochs": 1, "accelerator": "cpu", **trainer})
    model.set_trainer(lightning)
    lightning.fit(model, DataLoader(rows, 1, collate_fn=collate))
    return model


def script(folder, **more):
    return MinitronModel.from_hf(folder, optim={"name": "sgd", "lr": RATE}, **more)


def by_hand(folder, steps, clip=None):
    """The weights after steps of the given rows, each by the mean over all of its tokens."""
    model = load_model(folder, dtype=torch.float32)
    for rows in steps:
        given = collate(rows)
        found = model(given["input_ids"], attention_mask=given["attention_mask"]).logits
        model.zero_grad()
        labels = given["labels"][:, 1:].flatten()
        F.cross_entropy(found[:, :-1].flatten(0, 1), labels, ignore_index=-100).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        with torch.no_grad():
            for weight in model.parameters():
                weight -= RATE * weight.grad
    return model.state_dict()


def moved(before, after):
    """All weights' way, in one vector."""
    return torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)])


def main(out, folder, way):
    """One step of two ranks with two micro-batches each, all of other lengths."""
    strategy = sharding_strategy(1) if way == "shard" else way
    model = script(Path(folder))
    fitted(model, rows_of(*FOUR), accumulate_grad_batches=2, devices=2, strategy=strategy)
    model.gather()
    if int(os.environ["RANK"]) == 0:
        Path(out).mkdir()
        model.save_hf(Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
