"""What a program does before anything else."""

import gc


def look_for_old_garbage_seldom() -> None:
    """Lets Python look for garbage among old objects a hundred times less often than by default.

    torch, transformers and NeMo make a million objects while they are imported, which all stay. To
    go through them again and again takes a fifth of a command's start. Garbage of young objects is
    found as ever, and that of models where they are let go (``models.causal_lm.free``).
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1_000)
