"""Settings of a training that neither Lightning nor NeMo has, and the state that they can go on with."""

from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.training.loss_guard import Spikes


@dataclass(frozen=True)
class Options:
    """Settings that neither Lightning nor NeMo has.

    Attributes:
        activation_checkpointing: whether layers keep no activations, and compute them again.
        compile: whether layers and loss are compiled: ``on``, ``off``, or ``auto`` (see
            ``training.compilation``).
        ema_decay: of the moving average that takes the weights' place; None: there is none.
        spikes: losses that are as bad as those that are not finite.
        peak_tflops: see ``TrainingLog``.
        shard: whether weights, gradients and optimiser state are split over the ranks (FSDP2).
        tensor_parallel: ranks that share the work on each sample; divides their number, and wants
            ``shard``.
        transformer_engine: ``off``; ``on``, its layers; ``fp8``, and their products in FP8.
        fp8_recipe: how these are scaled; see ``training.fp8_recipes``.
        only: patterns of the parameters that train; see ``models.trainable``. Empty: all do.
        stop_after: steps after which it ends, to go on another time; None: after all.
    """

    activation_checkpointing: bool = False
    compile: str = "off"
    ema_decay: float | None = None
    spikes: Spikes = Spikes()
    peak_tflops: float | None = None
    shard: bool = False
    tensor_parallel: int = 1
    transformer_engine: str = "off"
    fp8_recipe: str = "auto"
    only: tuple[str, ...] = ()
    stop_after: int | None = None


def check_state(state: Path, newest: Path | None, shard: bool) -> None:
    """Refuses to resume from a checkpoint that the other kind of training has written.

    A sharded training writes a folder of parts, any other one file; neither reads the other's.

    Args:
        state: the training's folder.
        newest: its newest checkpoint; None: there is none.
        shard: see ``Options``.

    Raises:
        ValueError: ``newest`` is of the other kind; the message says what resumes from it.
    """
    if newest is None or newest.is_dir() == shard:
        return
    kinds = (
        "replicate, a file with the whole weights",
        "shard, a folder with parts of the weights",
    )
    kind, other = ("shard", kinds[0]) if shard else ("replicate", kinds[1])
    raise ValueError(
        f"training.parallel={kind}: cannot resume from {newest}, a checkpoint of training.parallel={other}; "
        f"set training.parallel={other.partition(',')[0]} again, or move {state} away to start over"
    )
