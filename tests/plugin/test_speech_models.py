"""NeMo's speech language models: an LM whose embedding lies beside it, pruned with what surrounds it, and taught.

The classes of ``nemo.collections.speechlm2`` need packages that are not installed here; where they
are, the real SALM is taken besides a module of its shape.
"""

import copy
import importlib.util

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig
from torch import nn
from torch.nn import functional as F

from nemo_minitron import KnowledgeDistillation, ModelTransform, Pruning
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.plugin.transforms import DepthPruning, WidthPruning
from tests.plugin.test_nemo_script import QUIET
from tests.plugin.test_transforms import plan_for
from tests.support.models import logits, make_model, stream


class Salm(LightningModule):
    """The shape of ``speechlm2.models.SALM``: a sound of 8 numbers stands where the token 0 is."""

    def __init__(self, folder):
        super().__init__()
        self.cfg = DictConfig({"perception": {"output_dim": 24}})
        self.llm = load_model(folder).train()
        self.embed_tokens = self.llm.model.embed_tokens
        del self.llm.model.embed_tokens
        self.perception = nn.Module()
        self.perception.encoder = nn.Linear(8, 24)  # as wide as the LM, by chance
        self.perception.proj = nn.Linear(24, 24)

    def prepare_inputs(self, batch):
        heard = self.perception.proj(torch.tanh(self.perception.encoder(batch["audios"])))
        embeds = torch.where(
            (batch["input_ids"] == 0)[..., None],
            heard[:, None],
            self.embed_tokens(batch["input_ids"]),
        )
        targets = batch["input_ids"].where(batch["loss_mask"], -100)
        return {
            "input_embeds": embeds[:, :-1],
            "attention_mask": torch.ones_like(targets)[:, :-1],
            "target_ids": targets[:, 1:],
        }

    def forward(self, input_embeds, attention_mask=None):
        return {
            "logits": self.llm(
                inputs_embeds=input_embeds, attention_mask=attention_mask, use_cache=False
            )["logits"]
        }

    def training_step(self, batch, batch_idx):
        inputs = self.prepare_inputs(batch)
        out = self(inputs["input_embeds"], attention_mask=inputs["attention_mask"])["logits"]
        loss = F.cross_entropy(out.flatten(0, 1), inputs["target_ids"].flatten(), ignore_index=-100)
        return {"loss": loss, "batch_size": 2}

    def validation_step(self, batch, batch_idx):
        for inner in batch.values():  # of several data sets
            self.training_step(inner, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([BATCH], batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader([{"set": BATCH}], batch_size=None)


class Duplex(LightningModule):
    """The shape of ``speechlm2.models.DuplexS2SModel``: embedding and head beside a decoder, and a second head."""

    def __init__(self, folder):
        super().__init__()
        whole = load_model(folder).train()
        self.llm, self.lm_head = whole.model, whole.lm_head
        self.embed_tokens = self.llm.embed_tokens
        del self.llm.embed_tokens
        self.perception = nn.Module()
        self.perception.proj = nn.Linear(8, 24)
        self.embed_audio_tokens = nn.ModuleList(nn.Embedding(5, 24) for _ in range(2))
        self.audio_head = nn.Linear(24, 10)

    training_step, configure_optimizers = Salm.training_step, Salm.configure_optimizers
    train_dataloader = Salm.train_dataloader

    def forward(self, ids, audios, codes):
        x = self.embed_tokens(ids) + self.perception.proj(audios)[:, None]
        x = x + sum(embed(codes) for embed in self.embed_audio_tokens)
        hidden = self.llm(inputs_embeds=x, use_cache=False).last_hidden_state
        return self.lm_head(hidden), self.audio_head(hidden)


IDS = torch.arange(24).reshape(2, 12) * 7 % 96
BATCH = {
    "input_ids": IDS,
    "audios": torch.linspace(-1, 1, 16).reshape(2, 8),
    "loss_mask": torch.arange(24).reshape(2, 12) % 3 > 0,
}


def around(module, kept):
    """What is expected of the parts around an LM, cut by hand."""
    weights = {
        name: p.detach().clone()
        for name, p in module.named_parameters()
        if not name.startswith(("llm.", "lm_head"))
    }
    for name in weights:
        if name in ("perception.proj.weight", "perception.proj.bias"):
            weights[name] = weights[name][kept]
        elif name.startswith(("embed", "audio_head.weight")):
            weights[name] = weights[name][:, kept]
    return weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Salm, Duplex])
def test_what_feeds_and_reads_the_lm_is_cut_along(tmp_path, kind, tied):
    folder = make_model(tmp_path / "m", "llama", tie_word_embeddings=tied)
    _, plan = plan_for(folder)
    module = kind(folder)
    expected, objects = around(module, plan.keep["hidden"]), dict(module.named_parameters())
    assert Pruning(plan)(module) is module
    after = dict(module.named_parameters())
    assert not hasattr(getattr(module.llm, "model", module.llm), "embed_tokens")
    assert set(after) < set(objects) and all(after[name] is objects[name] for name in expected)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert module.embed_tokens.embedding_dim == module.perception.proj.out_features == 12
    if kind is Salm:
        assert (
            module.cfg.perception.output_dim == 12 and module.perception.encoder.out_features == 24
        )
        tokens = torch.arange(20)[None]
        whole = logits(stream(folder, tmp_path / "pruned", plan.keep, plan.layers_kept))
        found = module.eval()(module.embed_tokens(tokens))["logits"]
        assert torch.allclose(found, whole, atol=1e-5)
    else:
        assert (module.audio_head.in_features, module.embed_audio_tokens[1].embedding_dim) == (
            12,
            12,
        )
        text, sound = module(IDS, BATCH["audios"], IDS % 5)
        assert (text.shape[-1], sound.shape[-1]) == (96, 10)
    before = {name: p.clone() for name, p in after.items()}
    Pruning(plan)(module)  # it is pruned already
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("half", [DepthPruning, WidthPruning])
def test_a_half_of_a_plan_is_applied_alone(tmp_path, half):
    folder = make_model(tmp_path / "m", "llama")
    _, plan = plan_for(folder)
    module = Salm(folder)
    half(plan)(module)
    assert module.perception.proj.out_features == (24 if half is DepthPruning else 12)
    assert len(module.llm.model.layers) == (2 if half is DepthPruning else 3)
    assert torch.isfinite(module.training_step(BATCH, 0)["loss"])


def test_what_is_not_known_to_be_cut_is_refused_by_name_and_nothing_is_changed(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    _, plan = plan_for(folder)
    for change, message in (
        (lambda m: setattr(m.perception, "proj", nn.Identity()), "perception.proj is Identity of width None, expected the LM's 24"),
        (lambda m: setattr(m, "speech_generation", nn.Linear(24, 7)), r"speech_generation.weight \[7, 24\] has the LM's width 24"),
    ):  # fmt: skip
        module = Salm(folder)
        change(module)
        shapes = {name: p.shape for name, p in module.named_parameters()}
        with pytest.raises(ValueError, match=message):
            Pruning(plan)(module)
        assert {name: p.shape for name, p in module.named_parameters()} == shapes
        DepthPruning(plan)(module)  # which has no width in it
        assert len(module.llm.model.layers) == 2


def divergence(teacher, student):
    """The textbook's, over the positions that are learned."""
    rows = []
    for module in (teacher, student):
        inputs = module.prepare_inputs(BATCH)
        out = module(inputs["input_embeds"], attention_mask=inputs["attention_mask"])["logits"]
        rows.append(F.log_softmax(out[inputs["target_ids"] != -100].detach().double(), -1))
    p, q = rows
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_speech_model_is_pruned_and_taught_by_what_it_was(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    _, plan = plan_for(folder)
    module = Salm(folder)
    teacher, other = copy.deepcopy(module), copy.deepcopy(module)
    Pruning(plan)(other)
    expected = divergence(teacher, other)
    whole = {name: p.clone() for name, p in teacher.named_parameters()}
    module.model_transform = Pruning(plan)
    callbacks = [KnowledgeDistillation(teacher), ModelTransform()]
    lightning = Trainer(**QUIET, max_steps=1, num_sanity_val_steps=0, callbacks=callbacks)
    lightning.fit(module)
    found = {name: float(value) for name, value in lightning.callback_metrics.items()}
    assert expected > 0.01 and found["kd_loss"] == pytest.approx(expected, rel=1e-4)
    assert found["val_divergence"] == pytest.approx(divergence(teacher, module), rel=1e-4)
    assert not torch.equal(module.perception.proj.weight, other.perception.proj.weight)  # it learns
    assert all(torch.equal(p, whole[name]) for name, p in teacher.named_parameters())
    assert not {"training_step", "prepare_inputs"} & set(vars(module))


def test_who_cannot_be_taught_is_said_in_a_sentence(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    for module, teacher, message in (
        (Duplex(folder), folder, "Duplex is not of SALM's shape, an LM with its head in llm"),
        (Salm(folder), folder, "is taught by a whole one, such as copy.deepcopy"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(**QUIET, max_steps=1, callbacks=[KnowledgeDistillation(teacher)]).fit(module)
        assert not {"training_step", "prepare_inputs"} & set(vars(module))


PERCEPTION = {
    "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule", "output_dim": 24,
    "preprocessor": {"_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor", "features": 16},
    "encoder": {"_target_": "nemo.collections.asr.modules.ConformerEncoder", "feat_in": 16, "n_layers": 1, "d_model": 16,
                "n_heads": 2, "subsampling": "dw_striding", "subsampling_factor": 8, "subsampling_conv_channels": 8},
    "modality_adapter": {"_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector", "d_model": 16},
}  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("lhotse") is None, reason="NeMo's speech packages are not installed"
)
def test_nemo_s_own_class_is_pruned_and_taught(teacher):
    from nemo.collections.speechlm2.models import SALM

    folder = teacher
    config = {"pretrained_llm": str(folder), "pretrained_weights": False, "audio_locator_tag": "<audio>", "perception": PERCEPTION,
              "prompt_format": "plain", "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}}  # fmt: skip
    module = SALM(config)
    _, plan = plan_for(folder)
    ids = IDS.clamp(max=80)
    ids[:, 2] = module.audio_locator_tag_id
    batch = {
        "input_ids": ids,
        "loss_mask": BATCH["loss_mask"],
        "audios": torch.randn(2, 16000),
        "audio_lens": torch.tensor([16000, 16000]),
    }
    before = copy.deepcopy(module)
    module.model_transform = Pruning(plan)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    callbacks = [ModelTransform(), KnowledgeDistillation(before)]
    lightning = Trainer(**QUIET, max_steps=1, callbacks=callbacks)
    lightning.fit(module, loader)
    assert module.llm.config.hidden_size == module.perception.proj.out_features == 12
    assert float(lightning.callback_metrics["kd_loss"]) > 0
