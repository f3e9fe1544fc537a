"""Keys of ``cascade``."""

from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.option import option


@dataclass
class CascadeConfig:
    """Several cuts one after the other, each distilled before the next."""

    sizes: list[Any] = option(
        [],
        "what each step cuts to, in order: sizes by axis, or a number of parameters, which plan.budget then "
        "searches for, as in [{ffn: 9216}, {ffn: 7168, layers: 24}] or [5.3e9,3.5e9]; empty: no cascade",
        least=1,
    )
    teacher: str = option(
        "source",
        "what every step learns from: the first source, or the student of the step before",
        ("source", "previous"),
    )
    one_shot: bool = option(
        True, "also cut to the last size at once, and distil on as many tokens as all steps take"
    )
