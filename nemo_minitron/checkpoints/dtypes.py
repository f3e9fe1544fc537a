"""Names of dtypes: safetensors', torch's, config.json's."""

import torch

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the dtypes that weights may have here."""


STORED = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names to those of the dtypes that exports have."""


FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Names of the dtypes that weights may have here, and bytes of one number."""


DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip
