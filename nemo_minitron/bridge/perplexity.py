"""torch: held-out loss of a Hugging Face causal LM, one chunk of logits at a time."""

from typing import Any

from torch import Tensor

from nemo_minitron.bridge.models import head_of, hidden_states, softcap_of
from nemo_minitron.core.losses import LossWeights, fused_linear_loss
from nemo_minitron.families import Family


def held_out_loss(model: Any, family: Family, tokens_NS: Tensor, batch_size: int) -> float:
    """Mean cross-entropy in nats per token.

    Args:
        model: a causal LM in evaluation mode.
        family: its family.
        tokens_NS: packed samples, Tensor of shape [samples, positions + 1].
        batch_size: samples per forward pass.
    """
    total = 0.0
    for batch_BS in tokens_NS.split(batch_size):
        batch_BS = batch_BS.to(head_of(model).device)
        hidden_TH = hidden_states(model, family, batch_BS[:, :-1]).flatten(0, 1)
        terms = fused_linear_loss(
            hidden_TH,
            head_of(model),
            batch_BS[:, 1:].flatten(),
            LossWeights(kl=0.0, ce=1.0),
            softcaps=(softcap_of(model, family), None),
        )
        total += float(terms.ce) * len(batch_BS)
    return total / len(tokens_NS)
