"""Lightning's loop over a training, which also ends what a kill has cut short behind the last step."""

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop


class WholeFitLoop(_FitLoop):
    """Ends a training that resumes behind its last step as one that never stopped.

    Lightning leaves at once where no step is left to take. But a step is saved before its validation,
    which may decide the result, and callbacks have their say at the end.
    """

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do."""
        ends = self.restarting and self.trainer.limit_train_batches != 0
        return bool(super().skip) and not ends

    def on_run_start(self) -> None:
        """Makes up for the validation, where one was due and did not come to its end; all hooks are called.

        Between steps Lightning does so itself; where the log has the validation, NeMo's loop over
        batches holds that none is due.
        """
        super().on_run_start()
        batches = self._data_fetcher
        assert batches is not None
        if self.restarting and self.done and self.epoch_loop._should_check_val_fx(batches):
            self.epoch_loop.on_advance_end(batches)


def end_what_was_cut_short(trainer: Trainer, least: int = 0) -> None:
    """Gives a Trainer the loop, before it has begun.

    Args:
        trainer: Lightning's.
        least: epochs before which early stopping ends nothing. Where ``min_steps`` is given, Lightning takes
            one for granted, and a training here is one epoch.
    """
    before = trainer.fit_loop
    loop = WholeFitLoop(trainer, least, before.max_epochs)
    loop.epoch_loop = before.epoch_loop
    trainer.fit_loop = loop
