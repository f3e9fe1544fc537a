"""Which settings make a batch job that an earlier flow left another one than is wanted."""

import pytest

from nemo_minitron.config.compose import as_dict, load_config
from nemo_minitron.launch.job_recipe import recipe_of
from nemo_minitron.launch.launcher import Call
from nemo_minitron.launch.out_of_memory import with_halved_micro_batch

BASE = ["launch.kind=slurm", "launch.processes=2", "source.model=/m", "data.train.paths=[/t]",
        "distill.batch_size=8", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=20"]  # fmt: skip
CORRECTED = ["correct.enabled=true", "correct.batch_size=8"]


def recipe(*words):
    return recipe_of(as_dict(load_config("config", [*BASE, *words])))


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ([], ["distill.batch_size=4", "trainer.accumulate_grad_batches=4"]),
        ([], ["distill.batch_size=16", "launch.processes=1"]),
        ([], ["launch.processes=1", "launch.slurm.nodes=2"]),
        ([], ["launch.time_limit=60", "score.batch_size=1", "evaluate.batch_size=1"]),
        ([], ["trainer.val_check_interval=10", "export.name=tiny", "export.push_to_hub=me/tiny"]),
        ([], ["correct.batch_size=1", "pretrain.batch_size=1"]),  # there is none
        (
            CORRECTED,
            ["correct.enabled=true", "correct.batch_size=2", "+correct.trainer.accumulate_grad_batches=8"],
        ),
        (
            ["training.keep=best:loss", "training.validate_every=10"],
            ["training.keep=best:loss", "distill.batch_size=4", "trainer.accumulate_grad_batches=4",
             "training.validate_every=10"],
        ),
    ],
)  # fmt: skip
def test_how_a_stage_is_started_makes_no_other_job(given, other):
    assert recipe(*given) == recipe(*other)


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ([], ["distill.batch_size=16"]),
        ([], ["trainer.accumulate_grad_batches=4"]),
        ([], ["launch.processes=1"]),
        ([], ["launch.kind=inline"]),  # one process
        ([], ["launch.stages=[score]"]),
        ([], ["export.dtype=float32"]),
        ([], ["plan.ffn=3072"]),
        (CORRECTED, [*CORRECTED, "correct.batch_size=4"]),
        (CORRECTED, [*CORRECTED, "+correct.trainer.accumulate_grad_batches=1"]),
        (
            ["training.keep=best:loss"],
            ["training.keep=best:loss", "trainer.val_check_interval=10"],
        ),
        (
            ["training.keep=best:loss"],
            ["training.keep=best:loss", "training.validate_every=5"],
        ),
    ],
)
def test_what_decides_the_artifact_makes_another_job(given, other):
    assert recipe(*given) != recipe(*other)


@pytest.mark.parametrize("name", ["correct", "distill", "baseline"])
def test_a_micro_batch_that_was_halved_for_want_of_memory_makes_no_other_job(name):
    config = load_config("config", [*BASE, *CORRECTED])
    values = as_dict(config)
    lighter = with_halved_micro_batch(name, values)
    assert lighter != values and recipe_of(lighter) != recipe_of(values)  # of what others share
    assert Call(name, config, lighter, values).recipes == (recipe_of(values),) * 2
    assert Call(name, config, lighter, values, "search").recipes == (recipe_of(values), "search")
