"""Scoring against a plain forward pass over the same batches: all width axes and block influence together."""

import torch

from benchmarks.duel import duel, show
from nemo_minitron.bridge.models import decoder_of, frozen, new_model
from nemo_minitron.bridge.taps import Recorder
from nemo_minitron.families import families

SHAPE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip


def main() -> None:
    """Measures and prints."""
    model = new_model(SHAPE, seed=0).eval()
    tokens_BS = torch.randint(0, SHAPE["vocab_size"], (4, 256))
    decoder = decoder_of(model, families()["llama"])

    def forward() -> None:
        with frozen(model):
            model(input_ids=tokens_BS, use_cache=False)

    def decoder_only() -> None:
        with frozen(model):
            decoder(input_ids=tokens_BS, use_cache=False)

    def score() -> None:
        recorder = Recorder(families()["llama"], SHAPE, "mean", depth=True)
        with frozen(model), recorder.attached(model):
            decoder(input_ids=tokens_BS, use_cache=False)
        recorder.stacked()

    seconds = duel(
        {"forward": forward, "forward without the output projection": decoder_only, "score": score}, 12
    )
    overhead = seconds["score"] / seconds["forward without the output projection"]
    show(
        "score",
        "forward",
        seconds,
        {"score": 1.05},
        hooks_alone=f"{overhead:.3f} x the same forward without head",
    )


if __name__ == "__main__":
    main()
