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


QUANTISED = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
"""safetensors' names of the dtypes, of one byte each, that quantised weights are made of."""


BYTES = {**FLOATS, **dict.fromkeys(QUANTISED, 1)}
"""Bytes of one number of each dtype that is read here, of weights or of what they are made of."""
