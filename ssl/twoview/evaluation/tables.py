"""Tables of metrics as text, independent of how the tables are displayed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table whose cells are texts.

    Attributes:
        title: heading.
        header: names of the columns.
        rows: cells of each row, one for each column.
        note: explanation shown below the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def side_by_side(title: str, columns: Mapping[str, Mapping[str, str]], note: str) -> Table:
    """Make a table with a row for each metric and a column for each network; rows without any text are left out.

    Args:
        title: heading.
        columns: text of each metric by name of the metric, by name of the network.
        note: explanation shown below the table.
    """
    keys = dict.fromkeys(key for cells in columns.values() for key in cells)
    rows = [[key, *(cells.get(key, "") for cells in columns.values())] for key in keys]
    return Table(title, ["", *columns], [row for row in rows if any(row[1:])], note)


def figures_table(title: str, columns: Mapping[str, Mapping[str, Any]], note: str, hidden: Sequence[str] = ()) -> Table:
    """Format plain metrics as a table with a row for each metric and a column for each network.

    Args:
        title: heading.
        columns: metrics by name of the metric, by name of the network.
        note: explanation shown below the table.
        hidden: names of metrics that are left out.
    """
    names = {"nmi": "NMI", "ari": "ARI", "mean_average_precision": "mAP", "left_out": "queries left out"}
    cells = {
        column: {names.get(k, k.replace("_", " ")): number(value) for k, value in figures.items() if k not in hidden}
        for column, figures in columns.items()
    }
    return side_by_side(title, cells, note)


def percent(share: float | None) -> str:
    """Format a share in [0, 1] as percent; None gives an empty text."""
    return "" if share is None else f"{100 * share:.1f} %"


def with_interval(share: float, interval: Sequence[float]) -> str:
    """Format a share in [0, 1] as percent, with the lower and upper end of its interval."""
    low, high = (f"{100 * x:.1f}" for x in interval)
    return f"{percent(share)} ({low} to {high})"


def number(value: float | int | str | None) -> str:
    """Format a float with three decimals, and an integer or text unchanged; None gives an empty text."""
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
