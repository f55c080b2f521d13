"""Tables of figures as text, independent of how they are displayed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        title: heading.
        header: names of the columns.
        rows: each as long as ``header``.
        note: explanation shown below the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def side_by_side(title: str, columns: Mapping[str, Mapping[str, str]], note: str) -> Table:
    """A table with a row for each figure and a column for each network; empty rows are left out."""
    keys = dict.fromkeys(key for cells in columns.values() for key in cells)
    rows = [[key, *(cells.get(key, "") for cells in columns.values())] for key in keys]
    return Table(title, ["", *columns], [row for row in rows if any(row[1:])], note)


def figures_table(title: str, columns: Mapping[str, Mapping[str, Any]], note: str, hidden: Sequence[str] = ()) -> Table:
    """:func:`side_by_side` of plain figures by name, without those that are ``hidden``."""
    names = {"nmi": "NMI", "ari": "ARI", "mean_average_precision": "mAP", "left_out": "queries left out"}
    cells = {
        column: {names.get(k, k.replace("_", " ")): number(value) for k, value in figures.items() if k not in hidden}
        for column, figures in columns.items()
    }
    return side_by_side(title, cells, note)


def percent(share: float | None) -> str:
    """A share in [0, 1] in percent, nothing for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def with_interval(share: float, interval: Sequence[float]) -> str:
    """A share in percent with the ends of its interval."""
    low, high = (f"{100 * x:.1f}" for x in interval)
    return f"{percent(share)} ({low} to {high})"


def number(value: float | int | str | None) -> str:
    """A float with three decimals, an integer or text unchanged, nothing for None."""
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
