"""Every key of exp_manager and Trainer is honoured or refused by name: the table of docs/nemo.md, row by row."""

import copy
import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS
from nemo.utils.exp_manager import CallbackParams, EMAParams, ExpManagerConfig

from nemo_minitron.cli.main import main
from nemo_minitron.config import handed_on
from nemo_minitron.config.bounds import OPTIMISERS, SCHEDULES, check_handed_on
from nemo_minitron.config.compose import as_dict, load_config
from nemo_minitron.config.config import Config
from nemo_minitron.config.option import describe
from nemo_minitron.config.overrides import (
    EXP_MANAGER,
    NEMO_KEYS,
    TRAINER,
    check_overrides,
    duration,
)
from nemo_minitron.config.parallel import NAMED
from nemo_minitron.plugin.trainer import check_trainer

SAVED = "exp_manager.checkpoint_callback_params"


def rows():
    """Overrides of a case, and how the outcome begins."""
    text = (Path(__file__).parents[2] / "docs" / "nemo.md").read_text()
    (section,) = re.findall(
        r"^## Overrides of the command line$(.*?)(?=^## |\Z)", text, re.M | re.S
    )
    for left, right in re.findall(r"^\| (`.*?) \| (.*?) \|$", section, re.M):
        for case in re.split(r"(?<=`), (?=`)", left):
            yield re.findall(r"`([^`]+)`", case), right.partition(":")[0]


BASE = as_dict(load_config("config", []))


def checked(overrides):
    """What the composition of a configuration and the beginning of a training look at."""
    config = copy.deepcopy(BASE)
    for override in OverridesParser.create().parse_overrides(overrides):
        *sections, last = override.key_or_group.split(".")
        place = config
        for name in sections:
            place = place.setdefault(name, {})
        place[last] = override.value()
    check_handed_on(config)
    check_overrides(config)
    check_trainer(config["trainer"])


def test_every_optimiser_and_schedule_of_nemo_may_be_named():
    assert set(AVAILABLE_OPTIMIZERS) <= set(OPTIMISERS)
    assert set(AVAILABLE_SCHEDULERS) == set(SCHEDULES)


@pytest.mark.parametrize("key", ["detect_anomaly", "enable_progress_bar", "inference_mode"])
def test_a_switch_of_the_trainer_is_true_or_false(key):
    check_trainer({**BASE["trainer"], key: False})
    with pytest.raises(ValueError, match=f"trainer.{key}: expected true or false, found 'fasle'"):
        check_trainer({**BASE["trainer"], key: "fasle"})


def test_every_override_of_the_table_becomes_what_it_says():
    outcomes = {"honoured": 0, "refused": 0}
    for overrides, outcome in rows():
        key = overrides[0].partition("=")[0]
        try:
            checked(overrides)
        except ValueError as error:
            assert outcome == "refused", (overrides, error)
            assert str(error).startswith(key.rpartition(".")[0]), (overrides, error)
            assert "\n" not in str(error) and key.split(".")[-1] in str(error)
        else:
            assert outcome == "honoured", overrides
        outcomes[outcome] += 1
    assert min(outcomes.values()) > 20


def test_the_table_has_every_key_that_nemo_and_lightning_have():
    told = {overrides[0].partition("=")[0] for overrides, _ in rows()}
    known = {f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters}
    known |= {f"exp_manager.{field.name}" for field in dataclasses.fields(ExpManagerConfig)}
    known |= {f"{SAVED}.{field.name}" for field in dataclasses.fields(CallbackParams)}
    known -= {"trainer.self", SAVED, "exp_manager.ema"}
    assert known - told == set() and told - known == {"exp_manager.ema.enable"}
    ruled = {f"trainer.{name}" for name in TRAINER} | {
        f"exp_manager.{name}" for name in EXP_MANAGER
    }
    assert ruled <= told  # a rule of a key that they do not have refuses nothing


def test_of_lightnings_strategies_those_that_keep_the_model_whole_may_be_named():
    own = [
        name for name in StrategyRegistry.available_strategies() if name != "elsewhere"
    ]  # tests' own
    names = [*own, "auto"]
    assert set(NAMED) <= set(names)
    for section in ("trainer", "pretrain.trainer", "correct.trainer"):
        for name in names:
            word = f"{'' if section == 'trainer' else '+'}{section}.strategy={name}"
            if name in NAMED:
                load_config("config", [word])
                continue
            with pytest.raises(
                ValueError, match=rf"^{section}\.strategy: .*training\.parallel=shard"
            ):
                load_config("config", [word])


def test_ranks_share_the_layers_of_a_model_that_is_split_only():
    load_config("config", ["training.tensor_parallel=2", "training.parallel=shard"])
    with pytest.raises(
        ValueError, match=r"^training\.tensor_parallel=2: .*training\.parallel=shard"
    ):
        load_config("config", ["training.tensor_parallel=2"])


def fields(config):
    """Names of a dataclass of NeMo's, to those of the dataclasses in it."""
    hints, found = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        inner = [t for t in typing.get_args(hints[field.name]) if dataclasses.is_dataclass(t)]
        found[field.name] = fields(inner[0]) if inner else None
    return found


def test_the_known_keys_are_those_of_the_packages():
    known = dict.fromkeys(inspect.signature(Trainer.__init__).parameters)
    del known["self"]
    assert known == handed_on.TRAINER
    assert {**fields(ExpManagerConfig), "ema": fields(EMAParams)} == handed_on.EXP_MANAGER
    precisions = [typing.get_args(part) for part in typing.get_args(_PRECISION_INPUT)]
    assert {str(word) for part in precisions for word in part} == set(handed_on.PRECISIONS)


@pytest.mark.parametrize("section", ["trainer", "pretrain.trainer", "correct.trainer"])
def test_an_unknown_precision_is_refused_by_its_section(section):
    with pytest.raises(ValueError, match=rf"^{section}\.precision: expected one of .*, found 9$"):
        load_config("config", [f"++{section}.precision=9"])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["+trainer.limit_train_batches=5", "trainer.accumulate_grad_batches=2"], "trainer"),
        (["+trainer.limit_train_batches=4", "+correct.trainer.accumulate_grad_batches=3"], "trainer"),
        (["+pretrain.trainer.limit_train_batches=3.0", "trainer.accumulate_grad_batches=2"], "pretrain.trainer"),
    ],
)  # fmt: skip
def test_epochs_that_end_in_the_midst_of_a_step_are_refused_before_anything_runs(overrides, key):
    with pytest.raises(
        ValueError, match=rf"^{key}\.limit_train_batches: .* a multiple of accumulate_grad_batches"
    ):
        load_config("config", overrides)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("+exp_manager.create_tensorbord_logger=true",
         "exp_manager.create_tensorbord_logger: NeMo's exp_manager has no such key; nearest: create_tensorboard_logger"),
        (f"+{SAVED}.save_topk=3", f"{SAVED}.save_topk: NeMo's exp_manager has no such key; nearest: save_top_k"),
        ("+exp_manager.step_timing_kwargs={x: 3}", "step_timing_kwargs.x: NeMo's exp_manager has no such key; there "
         "are: reduction, sync_cuda, buffer_size"),
        ("+correct.trainer.max_stps=3", "correct.trainer.max_stps: Lightning's Trainer has no such argument; nearest: max_steps"),
    ],
)  # fmt: skip
def test_a_key_that_nobody_knows_is_refused_before_anything_runs(override, told):
    with pytest.raises(ValueError, match=re.escape(told)) as failed:
        load_config("config", [override])
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("section", ["trainer", "pretrain.trainer", "correct.trainer"])
def test_sections_of_a_stage_are_looked_at_too(section):
    with pytest.raises(ValueError, match=rf"^{section}\.fast_dev_run: .*trainer\.max_steps=1"):
        load_config("config", [f"++{section}.fast_dev_run=true"])
    with pytest.raises(ValueError, match=rf"^{section}\.max_epochs: counts passes"):
        load_config("config", [f"++{section}.max_epochs=2"])


@pytest.mark.parametrize(
    "value", ["1:00", 3600, "", {}, {"hours": -1}, {"hour": 1}, {"days": 10**12}, {"hours": "x"},
              {"hours": float("nan")}, "00:00:00:00", None, ["00:01:00:00"]]
)  # fmt: skip
def test_what_is_no_duration_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^exp_manager\.key: expected 'DD:HH:MM:SS' in quotes"):
        duration("exp_manager.key", value)
    assert duration("", "01:02:03:04") == duration("", {"days": 1, "seconds": 7384})


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.optim.lr=1", "here it is optim.lr"),
        ("+model.optim.sched.name=x", "here it is optim.sched.name"),
        ("model.global_batch_size=8", "here it is distill.batch_size, times trainer.accumulate"),
        ("model.micro_batch_size=8", "here it is distill.batch_size"),
        ("++model.train_ds.paths=[x]", "here it is data.train.paths"),
        ("name=x", "here it is workspace"),
        ("exp_manager.name=x", "write +exp_manager.name=..."),
        ("trainer.max_epochs=3", "write +trainer.max_epochs=..."),
        ("exp_manager.exp_dir=x", "use workspace=FOLDER"),
        ("+trainer.max_steps=3", "is there already; write trainer.max_steps=... without +"),
        ("+exp_manager.name=a/b", "expected a file's name"),
        (f"++{SAVED}.postfix=.ckpt", "expected a name's end of .nemo"),
        (f"~{SAVED}", "filename: expected {step}, by which"),
    ],
)
def test_a_key_that_is_called_otherwise_here_is_answered_with_the_one_to_use(override, told):
    with pytest.raises(ValueError, match=re.escape(told)) as failed:
        load_config("config", [override])
    assert "\n" not in str(failed.value)


def test_keys_that_are_named_instead_are_there():
    known = {name for name, _, _ in describe(Config)}
    for other in NEMO_KEYS.values():
        assert re.match(r"[\w.]+", other)[0].rstrip(".") in {
            *known,
            "workspace",
            "trainer.precision",
        }


def test_nemo_s_resolvers_work_in_overrides_and_files_and_nemo_still_has_its_own(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("defaults: [config, _self_]\ndistill: {batch_size: '${multiply:2,3}'}\n")
    given = ["trainer.max_steps=${sum:40,2}", "workspace=w-${gpu_name:}"]
    config = load_config("mine", given, str(tmp_path))
    assert (config.distill.batch_size, config.trainer["max_steps"]) == (6, 42)
    assert config.workspace == "w-None"  # there is no card here
    with pytest.raises(ValueError, match=r"cannot be resolved: .* missing"):
        load_config("config", ["trainer.max_steps=${multiply:2}"])
    with pytest.raises(
        ValueError, match=r"no such configuration key; a shell's variable is written \$P,"
    ):
        load_config("config", ["launch.slurm.setup=['export A=${P}']"])
    code = (
        "from nemo_minitron.config.compose import load_config\n"
        "load_config('config', ['trainer.max_steps=${multiply:2,3}'])\n"
        "import nemo.core.config.hydra_runner  # registers gpu_name, and does not where it is there\n"
        "assert load_config('config', ['trainer.max_steps=${sum:2,3}']).trainer['max_steps'] == 5\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("words", [["-cn", "mine"], ["--config-name=mine"], ["-cn=mine"]])
@pytest.mark.parametrize("folder", ["--config-path", "--config-dir", "-cp", "-cd"])
def test_configurations_are_named_as_nemo_s_users_name_them(tmp_path, capsys, words, folder):
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\ntrack: {experiment: mine}\n")
    assert main(["distill", folder, str(tmp_path), *words, "--cfg"]) == 0
    assert "experiment: mine" in capsys.readouterr().out


def test_a_recipe_without_fp8_is_not_passed_over():
    with pytest.raises(ValueError, match=r"fp8_recipe=current: .*transformer_engine=fp8"):
        load_config("config", ["training.fp8_recipe=current", "training.transformer_engine=on"])
    load_config("config", ["training.fp8_recipe=current", "training.transformer_engine=fp8"])
