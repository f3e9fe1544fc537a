"""measure-layers: what each kind of the model's layers takes on this machine, by its sizes."""

from dataclasses import asdict
from pathlib import Path

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.pruning.layer_times import FILE, latency_of, read_layer_times
from nemo_minitron.stages.inputs import teacher_folder
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.progress_bar import bar


def recipe(config: Config) -> Recipe:
    """Times the layers at several sizes, for bounds of time (``plan.budget.latency_ms`` and ``speedup``).

    Raises:
        ValueError: weights of a dtype that torch does not compute in.
    """
    folder, budget = Workspace(workspace_of(config)).layer_times, config.plan.budget
    source, teacher = teacher_folder(config)
    model = open_checkpoint(source).architecture
    from nemo_minitron.models.causal_lm import DTYPES, pick_device

    if budget.dtype not in DTYPES:
        raise ValueError(
            f"plan.budget.dtype: layers are measured in {', '.join(DTYPES)}, found {budget.dtype}"
        )
    device = pick_device(config.evaluate.device)
    from nemo_minitron.evaluation.speed import conditions

    settings = {
        "dtype": budget.dtype, "phase": budget.phase, "batch": budget.batch, "context": budget.context,
        "conditions": conditions(str(device)),
    }  # fmt: skip

    def build(_state: Path, temporary: Path, _ranks: Ranks) -> None:
        from nemo_minitron.evaluation.layer_speed import Pass, combinations, measure_layers

        what = Pass(DTYPES[budget.dtype], budget.phase, budget.batch, budget.context, device)
        with bar("measuring layers", combinations(model)) as advance:
            write_json(temporary / FILE, asdict(measure_layers(model, what, advance)))

    def summary() -> Summary:
        times = read_layer_times(folder / FILE)
        whole = latency_of(times, model)(range(model.sizes["layers"]), model.sizes)
        rows = []
        for number, kind in enumerate(times.kinds):
            layers = [layer for layer, own in enumerate(times.kind_of) if own == number]
            sizes = " ".join(
                f"{axis}={each[0]}..{each[-1]}"
                for axis, each in zip(kind.axes, kind.sizes, strict=True)
            )
            rows.append(
                (
                    f"{len(layers)} like layer {layers[0]}",
                    sizes,
                    f"{min(kind.ms):.4f}",
                    f"{kind.ms[-1]:.4f}",
                )
            )
        rows.append(
            ("outside of them", "", f"{min(times.outside.ms):.4f}", f"{times.outside.ms[-1]:.4f}")
        )
        what = f"{times.phase} at batch {times.batch}, context {times.context}, {times.dtype}"
        return Summary(
            f"{float(whole):.3f} ms a pass of the whole model, {what}, on {times.machine}",
            ("layers", "sizes", "smallest, ms", "whole, ms"), tuple(rows), asdict(times),
        )  # fmt: skip

    return Recipe(folder, "layer_times", settings, [teacher], build, summary)
