"""The overrides of a training of seconds."""

import pytest


@pytest.fixture
def words(teacher, corpus):
    return [
        f"source.model={teacher}", f"data.train.paths=[{corpus}]", "data.train.sequence_length=16",
        "data.validation.sequence_length=16", "data.validation.samples=8", "data.train.samples=96",
        "score.importance=magnitude", "plan.ffn=20", "trainer.val_check_interval=100", "trainer.accelerator=cpu",
        "optim.sched.warmup_steps=1", "trainer.log_every_n_steps=1", "distill.batch_size=2",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=7",
    ]  # fmt: skip
