"""Tables for the screen."""

from nemo_minitron.security.plain_text import plain


def age(seconds: float) -> str:
    """A time in words, in its largest unit, rounded down: "3 min", "5 h", "2 days"."""
    passed, units = max(0, int(seconds)), ((86400, "day"), (3600, "h"), (60, "min"), (1, "s"))
    unit, name = next((pair for pair in units if passed >= pair[0]), units[-1])
    return f"{passed // unit} {name}" + ("s" if name == "day" and passed >= 2 * unit else "")


def amount(bytes: int) -> str:
    """Bytes in words, in powers of 1000: "12.3 MB"."""
    value, units = float(bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.95 and len(units) > 1:  # would be written as 1000.0
        value, units = value / 1000, units[1:]
    return f"{bytes} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def print_table(
    columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...], title: str | None = None, left: int = 1
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
        console = Console(width=160)
    console.print(table)
