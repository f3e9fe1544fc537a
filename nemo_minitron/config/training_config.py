"""Keys of ``training``."""

from dataclasses import dataclass

from nemo_minitron.config.bounds import SHARE, Bounds
from nemo_minitron.config.option import option


@dataclass
class TrainingConfig:
    """Settings of every training that Lightning and NeMo do not have."""

    max_tokens: int | None = option(
        None,
        "tokens to train on; sets trainer.max_steps, and the schedule with it, where the stage has no "
        "max_steps of its own",
        least=1,
    )
    validate_every: int | None = option(
        None,
        "steps between validations, however many micro-batches make a step; null: "
        "trainer.val_check_interval, which counts micro-batches",
        least=1,
    )
    parallel: str = option(
        "replicate",
        "under torchrun: a copy of the model on every rank (DDP), or its weights, gradients and optimiser "
        "state split over them (FSDP2)",
        ("replicate", "shard"),
    )
    tensor_parallel: int = option(
        1,
        "ranks that share the matrix products of each layer, with training.parallel=shard",
        least=1,
    )
    activation_checkpointing: bool = option(
        False, "keep no activations inside layers, compute them again in the backward pass"
    )
    compile: str = option(
        "auto",
        "torch.compile the layers of student and teacher, and what the loss computes between its matrix "
        "products; auto: on CUDA where Triton is installed, without Transformer Engine and tensor "
        "parallelism; true and false stand for on and off",
        ("auto", "on", "off"),
        synonyms={"true": "on", "false": "off"},
    )
    transformer_engine: str = option(
        "off",
        "on: Transformer Engine's linear layers and norms in student and teacher; fp8: and their products in "
        "FP8 (CUDA, pip install nemo-minitron[te]); not with compile=on",
        ("off", "on", "fp8"),
    )
    fp8_recipe: str = option(
        "auto",
        "how transformer_engine=fp8 scales, by the names of Transformer Engine's recipes: DelayedScaling, "
        "Float8CurrentScaling, MXFP8BlockScaling (Blackwell), Float8BlockScaling (Hopper); auto: what it "
        "takes by itself on the device",
        ("auto", "delayed", "current", "mxfp8", "block"),
    )
    only: list[str] = option(
        [],
        "patterns of the parameters that train, by their names in the model (named_parameters), as in "
        "['*.mlp.experts.*']; router stands for what sends tokens to experts; all others keep their bytes; "
        "empty: all train; not of trainings that begin with random weights",
    )
    ema_decay: float | None = option(
        None,
        "decay of a moving average of the weights that is validated and becomes the result",
        bounds=SHARE,
    )
    on_bad_loss: str = option(
        "stop",
        "what a loss or gradient that is not finite, or a spike, does: stop; or skip: go back to the last "
        "checkpoint and leave the batches of that step out",
        ("stop", "skip"),
    )
    spike_factor: float | None = option(
        None,
        "a loss this many times the median of the last spike_window steps is a spike; null: off",
        bounds=Bounds(above=1),
    )
    spike_window: int = option(32, "steps whose losses make the median", least=2)
    max_skips: int = option(
        10, "steps that on_bad_loss=skip leaves out before it gives up", least=1
    )
    peak_tflops: float | None = option(
        None,
        "a device's peak in 1e12 FLOP/s, for the log's mfu; null: only of known cards",
        bounds=Bounds(above=0),
    )
