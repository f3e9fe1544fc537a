"""A training step on an accelerator: the host waits for nothing between two logged steps."""

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("nemo")

from lightning.pytorch import Callback

from nemo_minitron.losses.intermediate import IntermediateWeights
from tests.support import accelerator
from tests.support.accelerator import NAME, Elsewhere
from tests.support.models import make_model
from tests.support.nemo_training import ALL, distillation, run

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Waits(TorchDispatchMode):
    """Notes the operations after which a host has to wait for the accelerator."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Elsewhere)]
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith(("index", "_index_put")) and any(
            x.dtype in (torch.bool, torch.uint8) for x in there[1:]
        )
        leaves = name == "_to_copy" and torch.device(kwargs.get("device") or NAME).type == "cpu"
        comes = (
            name == "_to_copy"
            and not there
            and torch.device(kwargs.get("device") or "cpu").type == NAME
        )
        if (
            there
            and (name.startswith(WAITS) or by_mask or (leaves and not kwargs.get("non_blocking")))
        ) or (comes and not kwargs.get("non_blocking")):
            self.found.add(f"{name} at {_where()}")
        return func(*args, **kwargs)


def _where():
    import traceback

    ours = [
        f
        for f in traceback.extract_stack()
        if "/tests/" not in f.filename and "/torch/" not in f.filename
    ]
    return " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in ours[-1:-4:-1])


class Watching(Callback):
    """Watches the third step of a training that logs every tenth."""

    def __init__(self):
        self.waits = Waits()
        self.steps = 0

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            self.waits.__enter__()

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            self.waits.__exit__(None, None, None)
            self.steps += 1


@pytest.mark.parametrize("way", ["pretraining", "distillation", "intermediate"])
@pytest.mark.parametrize("family", ["llama"])
def test_nothing_is_waited_for(tmp_path, way, family):
    student = make_model(tmp_path / "student", family)
    watching, callbacks = Watching(), []
    if way != "pretraining":
        inside = IntermediateWeights(ALL, relation_heads=2) if way == "intermediate" else None
        callbacks = [distillation(make_model(tmp_path / "teacher", family, seed=1), inside)]
    with accelerator.accelerator():
        run(student, tmp_path / "state", 4, [*callbacks, watching], accelerator=NAME, strategy=NAME,
            log_every_n_steps=10, val_check_interval=4, gradient_clip_val=1.0)  # fmt: skip
    assert watching.steps == 1
    if watching.waits.found:
        pytest.fail("\n".join(["the host waits for", *sorted(watching.waits.found)]), pytrace=False)
