"""Tables of a report, and their display in a terminal."""

from collections.abc import Mapping
from typing import Any

from twoview.evaluation.compare import probe_titles
from twoview.evaluation.probe import describe_choice
from twoview.evaluation.settings import MEASURES
from twoview.evaluation.tables import Table, percent, side_by_side, with_interval


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return all tables of a report: accuracies, parts that are missing, then the table of each measure.

    There is no table of a measure that is missing for the trained network.
    """
    found = [_accuracies(report)]
    columns, missing = _columns(report), report.get("missing", {})
    if missing:
        rows = [[network, part, reason] for network, parts in missing.items() for part, reason in parts.items()]
        note = "The evaluation was interrupted; repeat it to complete it." if report.get("incomplete") else ""
        found.append(Table("Not measured", ["network", "part", "reason"], rows, note))
    for name, measure in MEASURES.items():
        if name in missing.get("trained", {}):
            continue
        figures = {column: results[name] for column, results in columns.items() if name in results}
        if name in report:  # measured for the trained network only, and reported outside of the results
            figures = {report["method"]: report[name]}
        if figures and (table := measure.table(figures, report)):
            found.append(table)
    return found


def is_readable(report: Mapping[str, Any]) -> bool:
    """Whether a report of pretraining, read from a file, is complete and has the form that its display needs."""
    try:
        _ = tables(report) if "results" in report else None
        parts = [report.get("figures", {}), *report.get("results", {}).values()]
        whole = report["task"] == "pretrain" and not report.get("incomplete")
        return whole and all(isinstance(part, dict) for part in parts)
    except (LookupError, TypeError, ValueError, AttributeError):
        return False


def _columns(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return results by name of the column; the column of the trained network has the name of its method."""
    return {report["method"] if name == "trained" else name: row for name, row in report["results"].items()}


def _accuracies(report: Mapping[str, Any]) -> Table:
    columns: dict[str, dict[str, str]] = {}
    for name, row in _columns(report).items():
        cells: dict[str, str] = {}
        columns[name] = cells
        probes = {title: row[probe] for probe, title in probe_titles().items() if probe in row}
        for title, result in probes.items():
            cells[title] = with_interval(result["test_top1"], result["interval"])
            cells[f"{title}: chosen"] = describe_choice(result)
        for result in list(probes.values())[:1]:
            cells["class-balanced"] = percent(result["balanced_accuracy"])
            if "calibration_error" in result:
                cells["calibration error"] = percent(result["calibration_error"])
        if "geometry" in row:
            cells["diagnosis"] = row["geometry"]["diagnosis"]
    protocol = report["protocol"]
    title = f"{report['data']}: top-1 on {protocol['test_images']:,} test images"
    note = "Chosen on held-out training labels; test labels read once. In brackets 95 % intervals by bootstrap."
    if labels := protocol.get("labels"):
        note = f"{labels:,} of {protocol['train_images']:,} training labels used. {note}"
    if training := report.get("training"):
        note += f"\n{training['images_seen']:,} images seen in {training['seconds'] / 60:.1f} minutes"
    if cut := report["results"].get("raw pixels", {}).get("projection"):
        note += f"\nRaw pixels: {cut['pixels']:,} pixels projected to {cut['directions']:,} directions, "
        note += f"which keep {percent(cut['share'])} of the squared length."
    note += "".join(f"\nWarning: {warning}." for warning in report.get("warnings", []))
    return side_by_side(title, columns, note)


def show(table: Table) -> None:
    """Print a table to the terminal."""
    import rich
    from rich.markup import escape
    from rich.table import Table as RichTable

    shown = RichTable(title=escape(table.title), caption=escape(table.note))
    for place, name in enumerate(table.header):
        short = place > 0 and len(table.header) < 5
        shown.add_column(escape(name), justify="right" if place else "left", no_wrap=short)
    for row in table.rows:
        shown.add_row(*(escape(text.replace(" (", "\n(")) for text in row))  # break lines to fit a terminal
    rich.print(shown)
