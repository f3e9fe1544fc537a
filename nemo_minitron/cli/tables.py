"""Tables for the screen."""

from nemo_minitron.security.plain_text import plain


def print_table(
    columns: tuple[str, ...],
    rows: tuple[tuple[str, ...], ...],
    title: str | None = None,
    left: int = 1,
) -> None:
    """Prints a table, as wide as it needs to be where the output is no terminal.

    Args:
        columns: titles.
        rows: cells as text.
        title: above it.
        left: columns of words; those of numbers, to the right, follow.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(plain(title)))
    for i, column in enumerate(columns):
        table.add_column(Text(plain(column)), justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))  # text: a name is no markup
    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)
    console.print(table)
