"""A script of a user's that splits a model over two ranks: python -m tests.support.split_script MODEL TEXT OUT."""

import json
import os
import sys
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from nemo_minitron import MinitronModel
from tests.support.ragged_batches import QUIET


class Seen(Callback):
    """Notes what this rank reads; and gathers the weights in the midst, as one does to look at them."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, number):
        self.batches.append(batch.tolist())

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 2:
            module.gather()


def data(text):
    return {"paths": str(text), "sequence_length": 16, "samples": 12, "batch_size": 2}


def fitted(folder, text, callbacks=(), **trainer):
    """Three steps of plain gradient descent, by the loader that MinitronModel makes of train_ds."""
    lightning = Trainer(
        **QUIET, max_steps=3, accelerator="cpu", callbacks=list(callbacks), **trainer
    )
    optim = {"name": "sgd", "lr": 0.1}
    model = MinitronModel.from_hf(folder, optim=optim, train_ds=data(text), trainer=lightning)
    lightning.fit(model)
    return model


def refusal(model, folder):
    """What save_hf says where it refuses."""
    try:
        model.save_hf(folder)
    except ValueError as error:
        return str(error)
    return ""


def main(folder, text, out):
    rank, seen = int(os.environ["RANK"]), Seen()
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    model = fitted(folder, text, [seen], devices=2, strategy=strategy)
    place = out / f"hf{rank}"
    place.mkdir()
    said = refusal(model, place)  # what was gathered behind the second step is no longer the model
    model.gather()
    if rank == 0:
        model.save_hf(place)
    found = {"batches": seen.batches, "said": said}
    (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
