"""Pruning in memory gives what the stream gives."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

pytest.importorskip("nemo")

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.plugin.model_transform import ModelTransform
from nemo_minitron.plugin.nemo_archive import nemo_archive
from nemo_minitron.plugin.transforms import DepthPruning, Pruning, WidthPruning
from nemo_minitron.proofs.proof import TOGETHER, halved
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.pruning.head_merge import HeadMerge
from nemo_minitron.pruning.plan_file import make_plan, read_plan, write_plan
from nemo_minitron.pruning.select import score_shape, select_units
from nemo_minitron.scoring.importance import random_scores
from tests.support.models import logits, make_model, stream


def plan_for(folder, layers=(0, 2)):
    checkpoint = open_checkpoint(folder)
    sizes = checkpoint.architecture.sizes
    torch.manual_seed(0)
    scores = {"hidden": torch.rand(24), "ffn": torch.rand(3, 40), "heads": torch.rand(3, 6)}
    targets = {**sizes, "hidden": 12, "ffn": 17, "heads": 3}
    keep = select_units(checkpoint.family, scores, sizes, targets)
    return checkpoint, make_plan(checkpoint.architecture, keep, layers)


def streamed(checkpoint, plan, folder):
    return logits(stream(checkpoint.folder, folder, plan.keep, plan.layers_kept))


@pytest.mark.parametrize("name", sorted(families()))
def test_every_family_is_pruned_in_memory_as_on_disk(tmp_path, name):
    """Also where transformers fuses experts or renames modules in memory, and where a constant is folded."""
    family = families()[name]
    folder = tiny_model(family, family.proofs[0], tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    sizes, axes = checkpoint.architecture.sizes, checkpoint.architecture.present
    targets = halved(family, sizes, TOGETHER, [axis for axis in family.prunable if axis in axes])
    scores = {axis: random_scores(score_shape(family, sizes, axis), 0) for axis in family.prunable}
    keep = select_units(family, scores, sizes, {k: v for k, v in targets.items() if k != "layers"})
    fewer = 1 if "experts" in axes else None  # of two for each token
    layers = (1, 3) if "layers" in family.prunable else tuple(range(sizes["layers"]))
    plan = make_plan(checkpoint.architecture, keep, layers, experts_per_token=fewer)
    expected = logits(stream(folder, tmp_path / "pruned", keep, layers, fewer))
    model = load_model(folder, torch.float32)
    assert Pruning(plan)(model) is model
    assert torch.equal(model(torch.arange(20)[None]).logits, expected)


def test_experts_for_a_token_are_a_matter_of_width(mixture):
    architecture = open_checkpoint(mixture).architecture
    plan = make_plan(architecture, {}, (0, 2), experts_per_token=1)
    assert DepthPruning(plan)(load_model(mixture)).config.num_experts_per_tok == 2
    assert WidthPruning(plan)(load_model(mixture)).config.num_experts_per_tok == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "nemotron"])
def test_in_place_equals_the_stream_and_trains(tmp_path, name, tied):
    folder = make_model(tmp_path / "m", name, tie_word_embeddings=tied)
    checkpoint, plan = plan_for(folder)
    expected = streamed(checkpoint, plan, tmp_path / "pruned")
    model = load_model(folder)
    same = Pruning(plan)(model)
    assert same is model
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, expected)
    assert sum(p.numel() for p in model.parameters()) == plan.cost_after.parameters
    model.train()(tokens).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_width_then_depth_is_both_at_once_and_a_nemo_model_is_looked_into(tmp_path):
    folder = make_model(tmp_path / "m", "nemotron")
    checkpoint, plan = plan_for(folder)
    expected = streamed(checkpoint, plan, tmp_path / "pruned")
    wrapped = MinitronModel.from_hf(folder).eval()
    DepthPruning(plan)(WidthPruning(plan)(wrapped))
    assert torch.equal(wrapped.model(torch.arange(20)[None]).logits, expected)


@pytest.mark.parametrize("how", ["paper", "sum_output", "average_query"])
def test_heads_that_go_are_merged_as_on_disk(tmp_path, how):
    folder = make_model(tmp_path / "m", "qwen2")  # its queries have a bias
    checkpoint, plan = plan_for(folder)
    plan = replace(plan, merge=HeadMerge(how, partners(plan.keep["heads"])))
    expected = logits(
        stream(folder, tmp_path / "pruned", plan.keep, plan.layers_kept, merge=plan.merge)
    )
    model = load_model(folder)
    assert Pruning(plan)(model) is model
    assert torch.equal(computed(model), expected)
    wide = load_model(folder)
    DepthPruning(plan)(WidthPruning(plan)(wide))
    assert torch.equal(computed(wide), expected)
    assert not torch.equal(streamed(checkpoint, plan, tmp_path / "unmerged"), expected)
    shallow = DepthPruning(plan)(load_model(folder))
    assert shallow.config.num_attention_heads == 6


def partners(kept_LK):
    """Of two heads in each group, one goes into the other."""
    return kept_LK.repeat_interleave(2, dim=1)


def test_a_plan_on_disk_and_a_plan_for_another_model(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    _, plan = plan_for(folder)
    (tmp_path / "plan").mkdir()
    write_plan(tmp_path / "plan", plan)
    again = read_plan(tmp_path / "plan")
    assert (again.after, again.layers_kept, again.cost_after) == (
        plan.after,
        plan.layers_kept,
        plan.cost_after,
    )
    assert all(torch.equal(again.keep[axis], plan.keep[axis]) for axis in plan.keep)
    model = load_model(folder)
    Pruning(tmp_path / "plan")(model)
    before = computed(model)
    assert Pruning(plan)(model) is model  # it is pruned already
    assert torch.equal(computed(model), before)
    other = load_model(make_model(tmp_path / "other", "llama", intermediate_size=48))
    with pytest.raises(ValueError, match="the plan was made for sizes"):
        Pruning(plan)(other)
    with pytest.raises(ValueError, match="holds no Hugging Face model"):
        Pruning(plan)(torch.nn.Linear(2, 2))


def test_what_a_transform_pruned_is_saved_as_what_it_is(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    checkpoint, plan = plan_for(folder)
    expected = streamed(checkpoint, plan, tmp_path / "pruned")
    model = MinitronModel.from_hf(str(folder)).eval()
    Pruning(plan)(model)
    (tmp_path / "hf").mkdir()
    model.save_hf(tmp_path / "hf")
    assert torch.equal(logits(tmp_path / "hf"), expected)
    restored = MinitronModel.restore_from(
        str(nemo_archive(model, tmp_path / "m.nemo")), map_location="cpu"
    ).eval()
    assert torch.equal(restored.model(torch.arange(20)[None]).logits, expected)


def computed(model):
    with torch.inference_mode():
        return model.eval()(torch.arange(20)[None]).logits


class Module(LightningModule):
    """What a user writes: a model of transformers, and the optimiser of their choice."""

    def __init__(self, folder, early=False, **other):
        super().__init__()
        self.llm = load_model(folder).train()
        for name, model in other.items():
            setattr(self, name, model)
        self.made = torch.optim.SGD(self.parameters(), lr=0.1) if early else None

    def training_step(self, batch, _):
        return self.llm(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return self.made or torch.optim.SGD(trained, lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(40).reshape(4, 10), batch_size=2)


def fit(module, *callbacks):
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("early", [False, True])
def test_what_is_pruned_is_trained_and_what_is_frozen_stays(tmp_path, early):
    folder = make_model(tmp_path / "m", "llama", tie_word_embeddings=False)
    _, plan = plan_for(folder)
    module = Module(folder, early)
    frozen = module.llm.get_input_embeddings().weight.requires_grad_(False)
    expected = load_model(stream(folder, tmp_path / "pruned", plan.keep, plan.layers_kept))
    before = dict(expected.named_parameters())
    module.model_transform = Pruning(plan)
    fit(module, ModelTransform())
    after = dict(module.llm.named_parameters())
    assert {name: p.shape for name, p in after.items()} == {n: p.shape for n, p in before.items()}
    still = [name for name in after if torch.equal(after[name], before[name])]
    assert still == ["model.embed_tokens.weight"]
    assert module.llm.get_input_embeddings().weight is frozen and not frozen.requires_grad
    again = fit(module, ModelTransform())  # another trainer, the same module: it is pruned already
    assert again.global_step == 2


def test_what_was_set_on_a_model_survives(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    _, plan = plan_for(folder, (0, 2))
    model = load_model(folder).train()
    model.set_attn_implementation("eager")
    model.gradient_checkpointing_enable()
    model.generation_config.max_new_tokens = 7
    model.note, model.model.layers[2].mlp.note = "mine", "third"
    model.model.norm.float()
    model.model.layers[0].to(torch.bfloat16)
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].mlp.requires_grad_(False)
    model.model.layers[0].eval()
    seen, attention = [], model.model.layers[2].self_attn
    handle = attention.register_forward_hook(lambda *_: seen.append("forward"))
    model.model.layers[1].register_forward_hook(lambda *_: seen.append("dropped"))
    Pruning(plan)(model)
    assert (
        model.config._attn_implementation == "eager" and model.generation_config.max_new_tokens == 7
    )
    assert model.is_gradient_checkpointing and model.model.layers[1].gradient_checkpointing
    assert (model.note, model.model.layers[1].mlp.note) == ("mine", "third")
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert model.model.layers[1].self_attn is attention and attention.config is model.config
    assert {p.dtype for p in model.model.layers[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.model.layers[1].parameters()} == {torch.float32}
    assert [layer.training for layer in model.model.layers] == [False, True]
    free = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert free == {n for n, _ in model.named_parameters() if n.startswith("model.layers.1.mlp.")}
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(5)[None])
    assert seen == ["forward"]
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(5)[None])
    assert seen == ["forward"]


def test_which_model_is_meant_is_never_guessed(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    _, plan = plan_for(folder)
    teacher = load_model(folder)
    module = Module(folder, teacher=teacher)
    with pytest.raises(
        ValueError, match=r"holds 2 Hugging Face models \(llm, teacher\); say which"
    ):
        Pruning(plan)(module)
    module.model_transform = Pruning(plan)
    with pytest.raises(
        ValueError, match=r"in llm, teacher; say which .* ModelTransform\(at='llm'\)"
    ):
        fit(module, ModelTransform())
    whole = computed(teacher)
    fit(module, ModelTransform(at="llm"))
    assert torch.equal(computed(teacher), whole)
    assert module.llm.config.hidden_size == 12
    other = Module(folder, teacher=teacher)
    assert Pruning(plan, at="llm")(other) is other and other.llm.config.hidden_size == 12
    with pytest.raises(ValueError, match="Module has no module 'lm'"):
        Pruning(plan, at="lm")(other)
    with pytest.raises(
        ValueError, match="LlamaModel has no output head; expected a causal LM, as Llama"
    ):
        Pruning(plan)(load_model(folder).model)


def test_an_embedding_that_was_moved_out_is_named(tmp_path):
    folder = make_model(tmp_path / "m", "llama", tie_word_embeddings=False)
    _, plan = plan_for(folder)
    module = Module(folder)
    module.words = module.llm.model.embed_tokens  # as NeMo's SALM does, under another name
    del module.llm.model.embed_tokens
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight is not in the model; a module"
    ):
        Pruning(plan)(module)


def test_a_transform_that_leaves_an_early_optimiser_with_dead_weights_is_found_out(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    module = Module(folder, early=True)
    module.model_transform = lambda model: load_model(folder).train()
    with pytest.raises(
        ValueError, match="holds none of the parameters of Module: it was made before"
    ):
        fit(module, ModelTransform())


def test_a_layer_of_somebody_elses_is_named_and_nothing_is_changed(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    _, plan = plan_for(folder)
    model = load_model(folder)
    norm = model.model.layers[2].input_layernorm
    norm.register_parameter("bias", None)
    whole = computed(model)
    with pytest.raises(ValueError, match=r"layers\.2\.input_layernorm: LlamaRMSNorm stands where"):
        Pruning(plan)(model)
    assert torch.equal(computed(model), whole)
