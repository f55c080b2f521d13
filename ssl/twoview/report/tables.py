"""The tables of a report, the same for the terminal, Markdown and HTML."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

PROBES = {
    "linear": "linear probe",
    "linear_without_bn": "linear, no BatchNorm",
    "linear_sgd": "linear, SGD",
    "knn": "kNN",
    "finetune": "top-1",
}


class Table(NamedTuple):
    """``rows`` of as many texts as ``header`` has; ``note`` says how to read them."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All tables of a report, those without content left out."""
    found = [_accuracies(report)]
    protocol, trained = report["protocol"], next(iter(report["results"].values()))
    how = {"leave_one_out": "the other test images", "gallery": "training images"}.get(protocol.get("retrieval", ""))
    parts: dict[str, tuple[Callable[[Mapping[str, Any]], dict[str, str]], str]] = {
        "few_labels": (
            lambda part: {size: with_interval(x["mean"], x["interval"]) for size, x in part.items()},
            "Linear probe on few labelled training images; mean over draws and its 95 % interval.",
        ),
        "retrieval": (_numbers, f"Each test image looks for images of its class among {how}, by cosine similarity."),
        "clustering": (_numbers, "k-means on unit-length features of test images, as many clusters as classes."),
        "geometry": (_numbers, f"{trained.get('geometry', {}).get('words', '')}."),
    }
    for part, (cells_of, note) in parts.items():
        columns = {name: cells_of(row[part]) for name, row in _named(report) if part in row}
        if columns:
            found.append(beside(part.replace("_", " ").capitalize(), columns, note))
    if any("invariance" in row for _, row in _named(report)):
        found.append(_invariance({name: row["invariance"] for name, row in _named(report) if "invariance" in row}))
    if "integrity" in report:
        found.append(_integrity(report))
    if "linear" in trained:
        rows = [
            [name, "no test image" if share is None else percent(share)]
            for name, share in zip(report["classes"], trained["linear"]["per_class"], strict=True)
        ]
        found.append(Table("Classes", ["class", "recognised by the linear probe"], rows))
    return found


def _named(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Sources of features, the trained one by its method's name."""
    rows = report["results"].items()
    return [(report["method"] if name == "trained" else name, row) for name, row in rows]


def beside(title: str, columns: Mapping[str, Mapping[str, str]], note: str) -> Table:
    """A row a figure, a column a source of features; rows that are empty throughout are left out."""
    keys = dict.fromkeys(key for cells in columns.values() for key in cells)
    rows = [[key, *(cells.get(key, "") for cells in columns.values())] for key in keys]
    rows = [row for row in rows if any(row[1:])]
    return Table(title, ["", *columns], rows, note)


def _numbers(part: Mapping[str, Any]) -> dict[str, str]:
    names = {"nmi": "NMI", "ari": "ARI", "mean_average_precision": "mAP", "left_out": "queries left out"}
    left_out = ("spectrum", "words", "effective_rank_rows", "spread")
    return {names.get(k, k.replace("_", " ")): number(value) for k, value in part.items() if k not in left_out}


def _accuracies(report: Mapping[str, Any]) -> Table:
    columns: dict[str, dict[str, str]] = {}
    for name, row in _named(report):
        cells: dict[str, str] = {}
        columns[name] = cells
        for probe in PROBES:
            if result := row.get(probe):
                cells[PROBES[probe]] = with_interval(result["test_top1"], result["interval"])
                cells[f"{PROBES[probe]}: chosen"] = _chosen(result)
        for probe in PROBES:
            if result := row.get(probe):
                cells["class-balanced"] = percent(result["balanced"])
                if "calibration_error" in result:
                    cells["calibration error"] = percent(result["calibration_error"])
                break
        if "geometry" in row:
            cells["diagnosis"] = row["geometry"]["diagnosis"]
    title = f"{report['data']}: top-1 on {report['protocol']['test_images']:,} test images"
    note = "Chosen on held-out training labels; test labels read once. In brackets 95 % intervals by bootstrap."
    if labels := report["protocol"].get("labels"):
        note = f"{labels:,} of {report['protocol']['train_images']:,} training labels used. {note}"
    if training := report.get("training"):
        note += f"\n{training['images_seen']:,} images seen in {training['seconds'] / 60:.1f} minutes"
    return beside(title, columns, note)


def _chosen(result: Mapping[str, Any]) -> str:
    if "l2" in result:
        return f"L2 {result['l2']:g}"
    if "lr" in result:
        return f"learning rate {result['lr']:g}"
    return f"k {result['k']}, T {result['temperature']:g}"


def _invariance(sources: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ["operation", *(f"{name}: {what}" for name in sources for what in ("invariance", "accuracy"))]
    rows = [["none", *(cell for found in sources.values() for cell in ("1", percent(found["accuracy"])))]]
    for place, shift in enumerate(next(iter(sources.values()))["shifts"]):
        shifts = [found["shifts"][place] for found in sources.values()]
        name = f"{shift['operation']} {shift['strength']:g}"
        rows.append([name, *(cell for x in shifts for cell in (number(x["invariance"]), percent(x["accuracy"])))])
    note = (
        "What features ignore: 1 if an operation changes nothing, 0 if it changes as much as taking another image. "
        "Accuracy of the linear probe on augmented test images."
    )
    return Table("Invariance", header, rows, note)


def _integrity(report: Mapping[str, Any]) -> Table:
    found = report["integrity"]
    rows = [
        [f"test images that are in {split} too", f"{count['exact']} equal, {count['near']} nearly"]
        for split, count in found["shared"].items()
    ]
    for probe, share in found["top1_without_shared"].items():
        before = report["results"]["trained"][probe]["test_top1"]
        text = f"{percent(share)} (with them {percent(before)})"
        rows.append([f"{PROBES[probe]} without them", text])
    return Table("Integrity", ["", ""], rows, "Mirrored or cut copies are not looked for.")


def show(table: Table) -> None:
    """Print a table to the terminal."""
    import rich
    from rich.markup import escape
    from rich.table import Table as Rich

    shown = Rich(title=escape(table.title), caption=escape(table.note))
    for place, name in enumerate(table.header):
        shown.add_column(
            escape(name), justify="right" if place else "left", no_wrap=place > 0 and len(table.header) < 5
        )
    for row in table.rows:
        shown.add_row(*(escape(text.replace(" (", "\n(")) for text in row))  # narrow enough for a terminal
    rich.print(shown)


def percent(share: float | None) -> str:
    """A share of one as per cent, nothing for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def with_interval(share: float, interval: Sequence[float]) -> str:
    """A share as per cent with the ends of its interval."""
    low, high = (f"{100 * x:.1f}" for x in interval)
    return f"{percent(share)} ({low} to {high})"


def number(value: float | int | str | None) -> str:
    """A figure with three decimals, a count or word as it is, nothing for None."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
