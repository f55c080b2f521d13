"""Tables of a report, and their display in a terminal."""

import pytest
from evaluation.helpers_evaluation import full_evaluation

from twoview.evaluation.tables import Table, figures_table, number, percent, side_by_side, with_interval
from twoview.reporting.tables import show, tables


@pytest.fixture(scope="module")
def report(finished):
    return full_evaluation(finished.folder).report


def test_the_accuracies_are_those_of_the_report(report):
    table = tables(report)[0]
    assert table.header == ["", report["method"], "random initialization", "raw pixels"]
    rows = {row[0]: row[1:] for row in table.rows}
    titles = {"linear probe": "linear", "linear, no BatchNorm": "linear_without_bn", "kNN": "knn"}
    for place, results in enumerate(report["results"].values()):
        for title, probe in titles.items():
            if probe not in results:
                assert (probe, rows[title][place]) == ("linear_without_bn", "")
                continue
            low, high = results[probe]["interval"]
            expected = f"{100 * results[probe]['test_top1']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
            assert rows[title][place] == expected
        assert rows["linear probe: chosen"][place] == f"L2 {results['linear']['l2']:g}"
        assert rows["class-balanced"][place] == f"{100 * results['linear']['balanced_accuracy']:.1f} %"
        assert rows["diagnosis"][place] == results["geometry"]["diagnosis"]
    assert "450 test images" in table.title


def test_there_is_a_table_for_each_measure(report):
    found = {table.title: table for table in tables(report)[1:]}
    measures = ["Classes", "Few labels", "Retrieval", "Clustering", "Geometry", "Invariance", "Integrity"]
    assert list(found) == measures
    rows = {row[0]: row[1] for row in found["Geometry"].rows}
    geometry = report["results"]["trained"]["geometry"]
    assert rows["participation ratio"] == f"{geometry['participation_ratio']:.3f}"
    assert rows["spectrum decay"] == f"{geometry['spectrum_decay']:.3f}"
    assert "spectrum" not in rows
    assert found["Geometry"].note == f"{geometry['words']}."
    assert all(len(row) == len(table.header) for table in found.values() for row in table.rows)


def test_a_fine_tuned_network_has_one_table(report):
    result = {**report["results"]["trained"]["linear"], "lr": 0.003}
    del result["l2"]
    tuned = report | {"results": {"fine-tuned": {"finetune": result}}}
    tuned["protocol"] = report["protocol"] | {"labels": 270}
    del tuned["integrity"]
    (table,) = tables(tuned)
    rows = {row[0]: row[1] for row in table.rows}
    assert rows["top-1: chosen"] == "learning rate 0.003"
    assert table.note.startswith("270 of 1,347 training labels used. ")


def test_cells():
    assert (percent(0.1234), percent(None)) == ("12.3 %", "")
    assert with_interval(0.5, (0.25, 0.75)) == "50.0 % (25.0 to 75.0)"
    assert (number(0.12345), number(7), number("healthy"), number(None)) == ("0.123", "7", "healthy", "")


def test_rows_without_any_figure_are_left_out():
    table = side_by_side("title", {"a": {"x": "1", "y": ""}, "b": {"z": "2"}}, "note")
    assert table == Table("title", ["", "a", "b"], [["x", "1", ""], ["z", "", "2"]], "note")
    table = figures_table("title", {"a": {"nmi": 0.5, "spectrum": [1], "left_out": 0}}, "note", hidden=("spectrum",))
    assert table.rows == [["NMI", "0.500"], ["queries left out", "0"]]


def test_markup_in_a_name_is_shown_as_it_is(capsys):
    show(Table("[bold]title", ["", "[red]x"], [["[blue]row", "1 (0 to 2)"]], "[i]note"))
    text = capsys.readouterr().out
    for name in ("[bold]title", "[red]x", "[blue]row", "[i]note", "(0 to 2)"):
        assert name in text
