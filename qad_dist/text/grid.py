"""Tables that a terminal, a log and a README can hold: the same cells as plain text and as Markdown. Pure: no I/O."""

import io
import re
import unicodedata
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 100
"""Columns of a terminal that a table may fill."""

LONGEST_VALUE = 13
"""Characters of a value that is never folded: a language with its mark, a count below a billion."""

_JOINERS = "\u200c\u200d"  # Persian and Hindi are spelled with them
_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+\-=|~$&:/@^!]|(?<=\w)\.(?=\w))")


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells of one table: the first columns are text, the others numbers. The last row may be set apart."""

    header: list[str]
    rows: list[list[str]]
    has_total: bool = False
    text_columns: frozenset[int] = frozenset({0})


def as_text(grid: Grid) -> str:
    """Plain text of at most :data:`WIDTH` columns."""
    # ASCII: a table printed into a log must not depend on the terminal's encoding.
    table = Table(box=box.ASCII2, show_edge=False, pad_edge=False)
    for number, title in enumerate(grid.header):
        # Headers and long names may fold, values never do.
        longest = max((len(row[number]) for row in grid.rows), default=0)
        table.add_column(
            title,
            justify="left" if number in grid.text_columns else "right",
            overflow="fold",
            min_width=min(longest, LONGEST_VALUE),
        )
    for number, row in enumerate(grid.rows):
        table.add_row(*row, end_section=grid.has_total and number == len(grid.rows) - 2)
    output = io.StringIO()
    # Said in full, so that neither the terminal nor the environment has a say.
    console = Console(file=output, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def as_markdown(grid: Grid) -> str:
    """A Markdown table; cells of foreign text must be :func:`escaped`."""
    marks = ["---" if number in grid.text_columns else "---:" for number in range(len(grid.header))]
    lines = ["| " + " | ".join(grid.header) + " |", "|" + "|".join(marks) + "|"]
    for number, row in enumerate(grid.rows):
        is_total = grid.has_total and number == len(grid.rows) - 1
        lines.append("| " + " | ".join(f"**{cell}**" if is_total else cell for cell in row) + " |")
    return "\n".join(lines)


def visible(text: str, *, longest: int) -> str:
    """One line of a text that anybody may have written, without characters that steer a terminal or turn its direction.

    Args:
        text: Any Unicode text.
        longest: Characters to keep, the last of them an ellipsis if there are more.
    """
    kept = (" " if character.isspace() else character for character in text if _is_visible(character))
    line = " ".join("".join(kept).split())
    if len(line) <= longest:
        return line
    end = longest - 1
    while end > 0 and unicodedata.category(line[end])[0] == "M":  # not between a letter and its marks
        end -= 1
    return line[:end].rstrip() + "…"


def escaped(text: str) -> str:
    """A line that Markdown shows as it is, in a table too."""
    return _SPECIAL.sub(r"\\\1", text)


def _is_visible(character: str) -> bool:
    category = unicodedata.category(character)
    return character.isspace() or category[0] != "C" or character in _JOINERS
