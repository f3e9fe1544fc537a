"""docs/configuration.md, made from the configuration classes."""

from typing import Any

from nemo_minitron.config.config import Config
from nemo_minitron.config.option import describe, meaning


def markdown() -> str:
    """docs/configuration.md: every key with its default and meaning."""
    lines = ["# Configuration", "", "Made by `make docs` from `nemo_minitron/config/`.", ""]
    lines += ["| key | default | meaning |", "|---|---|---|"]
    defaults = Config()
    for name, item, _ in describe(Config):
        default: Any = defaults
        for part in name.split("."):
            default = getattr(default, part)
        shown = (
            "null"
            if default is None
            else str(default).lower()
            if isinstance(default, bool)
            else default
        )
        lines.append(f"| `{name}` | `{shown}` | {meaning(item)} |")
    lines += [
        "",
        "`trainer`, `optim` and `exp_manager` are handed to Lightning and NeMo; their defaults",
        "lie in `configs/config.yaml`, and further keys are added with `+`,",
        "as in `+trainer.limit_val_batches=2`. What a stage decides itself is refused by name:",
        "[each key](nemo.md#overrides-of-the-command-line).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
