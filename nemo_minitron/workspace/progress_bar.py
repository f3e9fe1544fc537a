"""How far something long is: a bar, where the screen is a terminal, and a file for who started it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nemo_minitron.workspace.progress import note


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar for the length of the block, and gives what advances it.

    Args:
        title: what is being done, in a word.
        total: how much there is.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        task, so_far = progress.add_task("", total=total), 0

        def advance(done: int) -> None:
            nonlocal so_far
            so_far += done
            progress.advance(task, done)
            note(title, so_far, total)

        yield advance
