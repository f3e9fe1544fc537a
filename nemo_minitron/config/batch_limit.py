"""``limit_train_batches``: of how many micro-batches Lightning makes an epoch, which has to be whole steps.

At the end of an epoch Lightning takes a step with whatever micro-batches there are. Where samples are
found by the number of steps, those that such a step lacks would be left out.
"""

from collections.abc import Mapping
from typing import Any

KEY = "limit_train_batches"


def batches_of_epoch(limit: int | float | None, batches: int) -> int:
    """What is left of so many micro-batches, as Lightning counts.

    Args:
        limit: a number of them, or up to 1.0 a share; None: all.
        batches: how many there are.
    """
    if limit is None:
        return batches
    if isinstance(limit, float) and limit <= 1:
        return int(batches * limit)
    return min(batches, int(limit))


def check_limit(key: str, limit: Any, per_step: int, batches: int | None = None) -> None:
    """Refuses epochs that end in the midst of a step.

    Args:
        key: what to call it in the message.
        limit: see ``batches_of_epoch``.
        per_step: micro-batches of a step.
        batches: micro-batches of the whole training; None: it is not known, nor of how many a share is.

    Raises:
        ValueError: there would be such epochs.
    """
    share = isinstance(limit, float) and limit <= 1
    if limit is None or (share and batches is None):
        return
    left = int(limit) if batches is None else batches_of_epoch(limit, batches)
    if left % per_step == 0 and (left or not limit):
        return
    near = max(left // per_step, 1) * per_step
    counted = f", which is {left:,} of {batches:,} micro-batches" if share else ""
    raise ValueError(
        f"{key}: an epoch would end in the midst of a step, and its other samples be left out; expected "
        f"a multiple of accumulate_grad_batches={per_step}, such as {near}, found {limit!r}{counted}"
    )


def check_sections(config: Mapping[str, Any], sections: tuple[str, ...]) -> None:
    """The same for sections of a configuration: what one leaves out it has from the first.

    Raises:
        ValueError: see ``check_limit``.
    """
    common: Mapping[str, Any] = {}
    for section in sections:
        own: Any = config
        for part in section.split("."):
            own = own[part]
        common = common or own
        place = section if own.get(KEY) is not None else sections[0]
        limit, per_step = (
            common.get(name) if own.get(name) is None else own[name]
            for name in (KEY, "accumulate_grad_batches")
        )
        check_limit(f"{place}.{KEY}", limit, per_step or 1)
