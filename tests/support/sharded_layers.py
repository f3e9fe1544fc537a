"""A rank of a sharded training with exchanged layers: python -m tests.support.sharded_layers MODEL STATE OUT."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from nemo_minitron.plugin.trainer import Options
from nemo_minitron.training.loss_guard import BadStep
from tests.support.nemo_training import run
from tests.support.transformer_engine import install


class Look(Callback):
    """Notes which weights of a layer lie whole in memory between two steps, and ends the first training."""

    def __init__(self, until=None):
        self.until, self.whole = until, set()

    def on_train_batch_end(self, trainer, module, *_):
        shapes = {tuple(p.shape) for p in module.model.model.layers.parameters() if p.dim() == 2}
        gc.collect()
        for thing in gc.get_objects():
            plain = isinstance(thing, torch.Tensor) and not isinstance(thing, DTensor)
            if plain and tuple(thing.shape) in shapes and thing.untyped_storage().size():
                self.whole.add(tuple(thing.shape))
        if trainer.global_step == self.until:
            raise BadStep(self.until, "stop")


def main(folder, state, out):
    """Trains, goes on after a stop, and writes the model as far as this rank may."""
    rank, looks = int(os.environ["RANK"]), [Look(5), Look()]
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, (9, 0))
        options = Options(transformer_engine="fp8", shard=True)
        with pytest.raises(BadStep):
            run(folder, state, 6, [looks[0]], options=options, devices=2)
        model = run(folder, state, 6, [looks[1]], options=options, devices=2)
    said = ""
    try:
        model.save_to(str(out / f"{rank}.nemo"))
    except ValueError as error:
        said = str(error)
    if rank == 0:
        (out / "hf").mkdir()
        model.save_hf(out / "hf")
    whole = sorted(looks[0].whole | looks[1].whole)
    found = {"whole": whole, "said": said, "fp8": sorted(map(str, device.seen))}
    (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
