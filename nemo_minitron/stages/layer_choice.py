"""Which layers a plan keeps, by the scores."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from nemo_minitron.config.config import Config
from nemo_minitron.pruning.select import contiguous, kept_layers, scattered
from nemo_minitron.scoring.depth import block_importance
from nemo_minitron.scoring.scores_file import Scores


def layers_of_plan(config: Config, sizes: Mapping[str, int], scores: Scores) -> list[int]:
    """The 0-based layers that a plan keeps.

    Raises:
        ValueError: the scores do not say which.
    """
    plan, layers = config.plan, sizes["layers"]
    if plan.drop_layers:
        return kept_layers(layers, plan.drop_layers)
    if plan.layers is None or plan.layers == layers:
        return list(range(layers))
    if "layers" not in scores.ranking:
        raise ValueError(
            "plan.layers: the scores rank no layers; run score with score.depth=block_influence"
        )
    going = layers - plan.layers
    if plan.layer_choice == "contiguous" and going > 1:
        blocks = (config.score.depth, going)
        if blocks not in scores.calibration.depth:
            if config.score.importance != "activation":
                raise ValueError(
                    f"plan.layer_choice=contiguous: score.importance={config.score.importance} measures no "
                    "blocks of layers; take plan.layer_choice=scattered, or score.importance=activation"
                )
            raise ValueError(
                f"plan.layer_choice=contiguous: the scores measured no blocks of {going} layers by "
                f"{config.score.depth}; run score with score.blocks=[{going}]"
            )
        return kept_layers(
            layers, contiguous(block_importance(blocks[0], scores.calibration.depth[blocks]), going)
        )
    if plan.layer_choice == "greedy":
        if len(scores.greedy) < going:
            raise ValueError(
                f"plan.layer_choice=greedy: the scores removed {len(scores.greedy)} layers, expected "
                f"{going}; run score with the same plan.layers and plan.layer_choice"
            )
        return kept_layers(layers, list(scores.greedy[:going]))
    return kept_layers(layers, scattered(scores.ranking["layers"], going))


def check_depths(config: Config, layers: int, depths: Iterable[int], scores: Scores) -> None:
    """Refuses depths for which the scores do not say which layers stay: a search would lose them in silence.

    Args:
        config: the whole configuration; its plan names no depth.
        layers: those of the model.
        depths: numbers of layers that a search may keep.
        scores: of the model.

    Raises:
        ValueError: there are some; of blocks that were not measured, the message names all.
    """
    plan, score = config.plan, config.score
    going = sorted({layers - depth for depth in depths} - {0})
    measured = {length for metric, length in scores.calibration.depth if metric == score.depth}
    missing = sorted({*going} - measured - {1})
    if plan.layer_choice == "contiguous" and missing and measured:
        blocks = ",".join(map(str, sorted({*score.blocks, *missing})))
        raise ValueError(
            f"plan.layer_choice=contiguous: a search down to {layers - going[-1]} of {layers} layers "
            f"asks for blocks of {', '.join(map(str, missing))} layers, which the scores did not measure by "
            f"{score.depth}; set score.blocks=[{blocks}], or take plan.layer_choice=scattered"
        )
    for count in going:
        one = replace(config, plan=replace(plan, layers=layers - count))
        layers_of_plan(one, {"layers": layers}, scores)
