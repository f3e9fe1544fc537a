"""The cost of the paper's family by hand: ``python -m benchmarks.paper.checks.flops``.

The FLOPs of a training step of the 15B, 8B and 4B, from [P1]'s sizes written out here, with attention to all positions and
with the half that is attended to; and the ratio of the family's costs by the printed numbers, unrounded, and with the
teacher's forward passes. Our counter must say the same (benchmarks/paper/family_cost.py); 1.803 is the printed numbers'.
"""

VOCABULARY, LAYERS, HEAD, GROUPS, CONTEXT, BATCH = 256_000, 32, 128, 8, 4096, 1152
MODELS = {"15B": (6144, 48, 24576), "8B": (4096, 48, 16384), "4B": (3072, 24, 9216)}
PRINTED = {"15B": 4.4, "8B": 2.5, "4B": 1.2}


def step(hidden: int, heads: int, ffn: int, attended: float) -> float:
    """FLOPs of forward and backward of a step."""
    attention = 2 * hidden * heads * HEAD + 2 * hidden * GROUPS * HEAD
    weights = LAYERS * (attention + 2 * hidden * ffn) + VOCABULARY * hidden
    scores = LAYERS * 2 * heads * HEAD * attended  # Q K^T, and its product with V
    return 3 * 2 * (weights + scores) * BATCH * CONTEXT


def ratio(costs: list[float], with_teacher: bool) -> float:
    """Three from scratch, against one from scratch and two on a fortieth of the tokens."""
    large, *small = costs
    extra = len(small) * large / 3 if with_teacher else 0
    return sum(costs) / (large + (sum(small) + extra) / 40)


def main() -> None:
    """Prints all of it."""
    every = {
        "printed": [1e17 * value for value in PRINTED.values()],
        "attention to all positions": [step(*sizes, CONTEXT) for sizes in MODELS.values()],
        "causal attention": [step(*sizes, CONTEXT / 2) for sizes in MODELS.values()],
    }
    for name, costs in every.items():
        told = ", ".join(
            f"{size} {cost / 1e17:.3f}e17" for size, cost in zip(MODELS, costs, strict=True)
        )
        print(
            f"{name}: {told}; {ratio(costs, False):.3f}, with the teacher's passes {ratio(costs, True):.3f}"
        )


if __name__ == "__main__":
    main()
