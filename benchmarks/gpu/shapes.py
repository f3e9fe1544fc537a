"""Models with random weights of the shapes that people have."""

from typing import Any

import torch

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_4B = {**LLAMA_8B, "hidden_size": 3072, "intermediate_size": 9216}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def random_model(config: dict[str, Any], device: str) -> Any:
    """A model with random weights in bf16, made on the device; always the same."""
    import transformers

    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
