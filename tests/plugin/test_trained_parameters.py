"""training.only: what trains and what keeps its bytes, in every way that a model is trained."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file

pytest.importorskip("nemo")

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.models.trainable import check_only, chosen, names_of, train_only
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.plugin.nemo_archive import nemo_archive
from nemo_minitron.plugin.trainer import Options, newest_checkpoint
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.stages.pretrain import recipe
from tests.support.models import INSTALLED
from tests.support.nemo_training import OPTIM, run
from tests.support.runs import refused
from tests.support.two_ranks import on_two_ranks, weights

ROUTER = Options(only=("router",))


def is_router(name):
    return name.endswith("mlp.gate.weight")


def changed(before, after):
    """Names of the tensors that are not what they were."""
    assert set(before) == set(after)
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize(
    "name", [name for name in sorted(INSTALLED) if "experts" in families()[name].taps]
)
def test_every_table_with_experts_says_where_the_router_is(tmp_path, name):
    family = families()[name]
    for number, changes in enumerate(family.proofs):
        folder = tiny_model(family, changes, tmp_path / f"{number}")
        architecture = open_checkpoint(folder).architecture
        if "experts" in architecture.present:
            break
    model = load_model(folder)
    train_only(model, family, ["router"])
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    sizes = architecture.sizes
    shape = (sizes["experts"], sizes["hidden"])
    matrices = [key for key, value in trained.items() if value.shape == shape]
    assert len(matrices) == len(architecture.present["experts"])
    vectors = [value for key, value in trained.items() if key not in matrices]
    assert all(value.numel() in shape for value in vectors)


def test_patterns_and_what_they_refuse(tmp_path, mixture, teacher):
    model, dense = load_model(mixture), load_model(teacher)
    family = families()["mixtral"]
    names = names_of(model)
    assert chosen(names, family, ["router"]) == {name for name in names if is_router(name)}
    assert chosen(names, family, ["*.1.*", "lm_head.weight"]) == {
        name for name in names if ".layers.1." in name or name == "lm_head.weight"
    }
    with pytest.raises(
        ValueError, match=r"training.only: \*.gate_proj: no parameter .* such a name; there are"
    ):
        chosen(names, family, ["router", "*.gate_proj"])
    with pytest.raises(ValueError, match="router: the table of llama names none"):
        train_only(dense, families()["llama"], ["router"])
    with pytest.raises(
        ValueError, match=r"training.only: lm_hea.weight: .*there are lm_head.weight"
    ):
        check_only(read_config(mixture), family, ["lm_hea.weight"])
    # a tied head may be named by either name, and what is frozen stays so
    tied = load_model(tiny_model(family, {"tie_word_embeddings": True}, tmp_path / "tied"))
    tied.model.norm.weight.requires_grad_(False)
    train_only(tied, family, ["lm_head.weight", "model.norm.weight"])
    assert [key for key, value in tied.named_parameters() if value.requires_grad] == [
        "model.embed_tokens.weight"
    ]


@pytest.mark.parametrize("average", [None, 0.5])
def test_the_router_alone_trains_resumes_and_leaves_no_state_for_the_rest(
    tmp_path, mixture, average
):
    options = Options(only=("router",), ema_decay=average)
    before = {
        k: v.clone() for k, v in load_model(mixture, dtype=torch.float32).state_dict().items()
    }
    whole = run(mixture, tmp_path / "whole", 7, options=options)
    after = whole.model.state_dict()
    assert changed(before, after) == {name for name in before if is_router(name)}
    groups = whole._optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(whole._optimizer.state) == 3
    newest = newest_checkpoint(tmp_path / "whole" / "nemo" / "checkpoints")
    saved = torch.load(newest, weights_only=False)
    if average is not None:
        assert all(is_router(name) for name in saved["callbacks"]["Averaging"]["average"])

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(mixture, tmp_path / "parts", 7, [Stop()], options=options)
    parts = run(mixture, tmp_path / "parts", 7, options=options)
    assert not changed(after, parts.model.state_dict())


def test_the_head_alone_trains_behind_a_frozen_decoder(tmp_path, mixture):
    """No gradient reaches the hidden states."""
    before = {
        k: v.clone() for k, v in load_model(mixture, dtype=torch.float32).state_dict().items()
    }
    model = run(mixture, tmp_path / "state", 2, options=Options(only=("lm_head.*",)))
    assert changed(before, model.model.state_dict()) == {"lm_head.weight"}


def test_a_nemo_script_says_it_in_the_models_configuration(tmp_path, mixture, corpus):
    data = {"paths": [str(corpus)], "sequence_length": 16, "samples": 8, "batch_size": 4}
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    model = MinitronModel.from_hf(mixture, OPTIM, trainer=trainer, only=["router"], train_ds=data)
    trainer.fit(model)
    (tmp_path / "hf").mkdir()
    model.save_hf(tmp_path / "hf")
    stored = [load_file(folder / "model.safetensors") for folder in (mixture, tmp_path / "hf")]
    assert changed(*stored) == {name for name in stored[0] if name.endswith("moe.gate.weight")}
    restored = MinitronModel.restore_from(
        str(nemo_archive(model, tmp_path / "model.nemo")), map_location="cpu"
    )
    trained = {name for name, value in restored.model.named_parameters() if value.requires_grad}
    assert trained == {name for name in names_of(model.model) if is_router(name)}
    with pytest.raises(ValueError, match=r"training\.only: gate: no parameter"):
        MinitronModel.from_hf(mixture, OPTIM, only=["gate"])


@pytest.fixture
def healed(mixture, corpus):
    """Overrides of a distillation of a mixture of half the experts."""
    return [
        f"source.model={mixture}", f"data.train.paths=[{corpus}]", "data.train.sequence_length=16",
        "data.validation.sequence_length=16", "data.validation.samples=8", "data.train.samples=32",
        "score.importance=magnitude", "plan.experts=4", "trainer.max_steps=4", "trainer.val_check_interval=4",
        "trainer.accelerator=cpu", "optim.sched.warmup_steps=1", "distill.batch_size=4", "training.only=[router]",
    ]  # fmt: skip


def test_a_distillation_heals_the_router_alone_also_in_parts_on_two_ranks(tmp_path, healed, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    for place in (one, two):
        assert main(["prune", f"workspace={place}", *healed]) == 0
    line = refused(capsys, "distill", f"workspace={one}", *healed, "training.only=[router,rooter]")
    assert "training.only: rooter: no parameter of the model has such a name" in line
    assert main(["distill", f"workspace={one}", *healed]) == 0
    assert "training.only: 288 of " in capsys.readouterr().err
    pruned = load_file(one / "pruned" / "model.safetensors")
    routers = {name for name in pruned if name.endswith("moe.gate.weight")}
    assert changed(pruned, weights(one)) == routers
    more = ["training.parallel=shard", "distill.batch_size=2"]
    done = on_two_ranks("distill", f"workspace={two}", *healed, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert changed(pruned, weights(two)) == routers
    for name in routers:
        assert torch.allclose(weights(two)[name], weights(one)[name], atol=1e-5), name
    # another choice is another student
    assert main(["distill", f"workspace={one}", *healed, "training.only=['*.0.*gate*']"]) == 0
    assert {name for name in changed(pruned, weights(one)) if name in routers} == {
        name for name in routers if ".0." in name
    }


def test_what_begins_with_random_weights_trains_as_a_whole(tmp_path, corpus):
    shape = "{model_type: llama, vocab_size: 300, hidden_size: 24, intermediate_size: 40, num_hidden_layers: 1, num_attention_heads: 2}"
    words = [f"workspace={tmp_path}", f"data.train.paths=[{corpus}]", f"+pretrain.model={shape}"]
    kept = [
        recipe(load_config("config", [*words, *more])).settings
        for more in ([], ["training.only=[x]"])
    ]
    assert kept[0] == kept[1]
