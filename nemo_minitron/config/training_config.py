"""Keys of ``training``."""

from dataclasses import dataclass

from nemo_minitron.config.bounds import SHARE, Bounds
from nemo_minitron.config.option import option


@dataclass
class PhaseConfig:
    """A part of a training with text of its own."""

    share: float = option(1.0, "share of the tokens", bounds=Bounds(above=0, most=1))
    sequence_length: int | None = option(
        None, "tokens per sample; null: data.train's", bounds=Bounds(least=1, most=2**24)
    )
    paths: list[str] | None = option(None, "text; null: data.train's")
    weights: list[float] | None = option(
        None, "shares of the samples, one for each path; null: data.train's", least=0
    )
    lr: float | None = option(
        None, "learning rate in the place of optim.lr; null: optim.lr", bounds=Bounds(above=0)
    )


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
    tasks: list[str] = option(
        [],
        "lm-eval tasks of log-likelihoods that the model is measured on while it trains, as in "
        "evaluate.tasks; they lie beside the validation losses in the log, the loggers and the report",
    )
    task_every: int = option(
        1, "validations from one measurement of the tasks to the next", least=1
    )
    task_limit: int | None = option(100, "documents per task while it trains; null: all", least=1)
    keep: str = option(
        "last",
        "which weights become the result: last; best:loss, those of the validation with the least held-out "
        "loss; best:TASK or best:TASK:METRIC, those that were best in one of training.tasks",
    )
    phases: list[PhaseConfig] = option(
        [],
        "parts of the training with text of their own, as in [{share: 0.9}, {share: 0.1, sequence_length: "
        "8192, lr: 1e-5}]: share of the tokens, sequence_length, paths and weights of the text, lr; what a "
        "phase leaves out is data.train's and optim's",
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
