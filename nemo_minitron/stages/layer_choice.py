"""Which layers a plan keeps, by the scores."""

from collections.abc import Mapping

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
