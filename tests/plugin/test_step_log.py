"""What is logged in the short way is there for everybody who reads it, as if logged in Lightning's."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from nemo_minitron.plugin.step_log import log_step


class Logs(LightningModule):
    """Logs values of steps, and means over epochs besides, in a module of the user's own."""

    def __init__(self, shortly):
        super().__init__()
        self.layer, self.shortly, self.calls = torch.nn.Linear(2, 1), shortly, 0

    def log(self, *arguments, **how):
        self.calls += 1
        super().log(*arguments, **how)

    def say(self, values):
        log_step(self, values, batch_size=3) if self.shortly else self.log_dict(
            values, batch_size=3
        )

    def on_train_batch_start(self, batch, batch_idx):
        self.say({"step": torch.tensor(float(self.global_step))})

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.say({"loss": loss, "half": (loss / 2).half()})
        self.log("mine", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=3)
        return loss

    def validation_step(self, batch, batch_idx):
        self.say({"val": self.layer(batch).square().mean()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Reads(Callback):
    def __init__(self):
        self.seen = []

    def _read(self, trainer, *_):
        for found in (
            trainer.callback_metrics,
            trainer.logged_metrics,
            trainer.progress_bar_metrics,
        ):
            self.seen.append({name: float(value) for name, value in found.items()})

    on_train_batch_end = on_train_epoch_end = on_validation_end = _read


@pytest.fixture
def seen():
    def train(shortly):
        torch.manual_seed(0)
        batches = DataLoader(torch.randn(15, 2), batch_size=3)
        reads, module = Reads(), Logs(shortly)
        how = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
        trainer = Trainer(
            accelerator="cpu", max_epochs=3, log_every_n_steps=2, val_check_interval=2,
            num_sanity_val_steps=0, enable_checkpointing=False, callbacks=[reads], **how,
        )  # fmt: skip
        trainer.fit(module, batches, batches)
        return reads.seen, module.calls

    return train


def test_all_who_read_see_what_lightnings_own_way_would_show(seen):
    (short, calls), (long, all_calls) = seen(True), seen(False)
    assert short == long and {"loss", "half", "step", "mine_epoch", "val"} <= set(short[-3])
    # three epochs of five batches with four names, and six validations of five batches
    assert all_calls == 15 * 4 + 6 * 5
    # in Lightning's own way: the first batch of each epoch, the means, and the validations
    assert calls == 3 * 4 + 12 * 1 + 6 * 5


def test_without_a_trainer_it_is_told_as_lightning_does():
    with pytest.warns(UserWarning, match="trainer` reference is not registered"):
        log_step(Logs(True), {"loss": torch.tensor(1.0)}, batch_size=1)
