"""What the tests of stages share."""

import pytest


@pytest.fixture
def words(teacher, corpus):
    return [
        f"source.model={teacher}", f"data.train.paths=[{corpus}]", "data.train.sequence_length=16",
        "data.validation.sequence_length=16", "data.validation.samples=16", "data.train.samples=96",
        "score.importance=magnitude", "plan.ffn=20", "trainer.max_steps=6", "trainer.val_check_interval=3",
        "trainer.accelerator=cpu", "optim.sched.warmup_steps=1", "trainer.log_every_n_steps=1",
        "distill.ce=0.1", "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
    ]  # fmt: skip
