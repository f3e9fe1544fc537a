"""What models write, and how they do on held-out text, against plain transformers and whole logits."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.evaluation.generation import agreement, continue_greedily, loss_of, repetition
from nemo_minitron.evaluation.held_out_loss import held_out
from nemo_minitron.families import family_of
from nemo_minitron.models.causal_lm import frozen


@pytest.fixture(params=["llama", "gemma2"])
def pair(request, model_folder):
    """Two models of one family (gemma2: with a softcap on its logits)."""
    folders = [model_folder(request.param, f"m{seed}", seed=seed) for seed in (0, 1)]
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = [load(folder, dtype=torch.float32).eval() for folder in folders]
    return models, family_of(read_config(folders[0]))


def tokens(rows, length):
    return torch.randint(2, 90, (rows, length), generator=torch.Generator().manual_seed(0))


def test_continuations_owe_nothing_to_the_sources_generation_settings(pair):
    (model, _), _ = pair
    prompts_BP = tokens(3, 6)
    plain = continue_greedily(model, prompts_BP, 24)
    own = model.generation_config
    # as a generation_config.json has them; each alone would change what is written, or stop it
    own.no_repeat_ngram_size, own.encoder_repetition_penalty = 1, 1.5
    own.suppress_tokens, own.bad_words_ids = plain[0, :3].tolist(), [[int(plain[0, 3])]]
    own.max_time, own.num_return_sequences, own.return_dict_in_generate = 1e-9, 2, True
    assert torch.equal(continue_greedily(model, prompts_BP, 24), plain)
    assert model.generation_config is own


def test_continuations_are_the_most_likely_tokens_one_after_the_other(pair):
    (model, _), _ = pair
    prompts_BP = tokens(3, 6)
    with frozen(model):
        found_BN = continue_greedily(model, prompts_BP, 8)
        whole = prompts_BP
        for _ in range(8):
            logits_BV = model(whole).logits[:, -1]
            logits_BV[:, model.generation_config.eos_token_id] = -torch.inf  # none ends early
            whole = torch.cat([whole, logits_BV.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found_BN, whole[:, 6:])


def test_the_loss_on_a_continuation_is_that_of_its_tokens_alone(pair):
    (model, other), family = pair
    prompts_BP, ids_BS = tokens(3, 6), tokens(3, 5).flip(0)
    with frozen(model):
        found = loss_of(model, family, prompts_BP, ids_BS)
        logits = model(torch.cat([prompts_BP, ids_BS], 1)).logits[:, 5:-1]
    assert found == pytest.approx(
        float(F.cross_entropy(logits.flatten(0, 1), ids_BS.flatten())), rel=1e-5
    )
    with frozen(other):
        assert loss_of(other, family, prompts_BP, ids_BS) != pytest.approx(found, rel=1e-3)


def test_held_out_text_against_whole_logits(pair):
    (teacher, model), family = pair
    samples_NS = tokens(5, 13)
    with frozen(teacher), frozen(model):
        found = held_out(model, family, samples_NS, 2, (teacher, family))
        ours, theirs = (m(samples_NS[:, :-1]).logits.double() for m in (model, teacher))
    losses = F.cross_entropy(ours.transpose(1, 2), samples_NS[:, 1:], reduction="none").mean(1)
    assert found.losses == pytest.approx(losses.tolist(), rel=1e-5)
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    assert found.divergence == pytest.approx(
        float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4
    )
    assert found.top1 == pytest.approx(
        float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    )
    with frozen(teacher):
        alike = held_out(teacher, family, samples_NS, 2, (teacher, family))
    assert (alike.divergence, alike.top1) == (pytest.approx(0, abs=1e-6), 1.0)


def test_repetition_and_agreement_by_hand():
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1]])
    assert repetition(rows) == pytest.approx((0 + 0.75) / 2)
    assert repetition(rows[:, :3]) == 0.0
    other = torch.tensor([[1, 2, 3, 9, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1]])
    assert agreement(rows, other) == pytest.approx((3 / 7 + 1) / 2)
