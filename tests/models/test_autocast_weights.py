"""A frozen model's weights, rounded once."""

import torch

from nemo_minitron.families import families
from nemo_minitron.models.autocast_weights import round_products
from nemo_minitron.models.causal_lm import hidden_states, new_model
from nemo_minitron.proofs.tiny_models import tiny_config


def test_autocast_finds_what_it_would_have_made():
    family = families()["llama"]
    model = new_model(tiny_config(family, {"attention_bias": True, "mlp_bias": True}), 0).eval()
    tokens_BS = torch.arange(32).reshape(2, 16)

    def states():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return hidden_states(model, family, tokens_BS)

    before = states()
    round_products(model, family, torch.bfloat16)
    assert torch.equal(states(), before) and before.dtype == torch.float32
    names = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert len(names) == 4 * 7 and not any(
        "norm" in n or "bias" in n or "embed" in n for n in names
    )
