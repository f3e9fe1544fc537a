"""The device that a stage computes on, before it is asked for: ranks meet over what that device speaks."""

from nemo_minitron.config.config import Config
from nemo_minitron.training.trainer_arguments import merged

_MEASURING = ("screen", "sensitivity", "evaluate")


def device_of(stage: str, config: Config) -> str:
    """What the stage's own key says: ``score.device``, ``evaluate.device``, or an accelerator of Lightning's.

    Args:
        stage: one of ``stages.run.SEVERAL``.
        config: the whole configuration.

    Returns:
        ``auto``, ``cpu``, or the name of an accelerator.
    """
    if stage == "score":
        return config.score.device
    if stage in _MEASURING:
        return config.evaluate.device
    own = {"pretrain": config.pretrain.trainer, "correct": config.correct.trainer}.get(stage, {})
    return str(merged(config.trainer, own).get("accelerator") or "auto")
