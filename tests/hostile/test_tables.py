"""What names from outside can do to tables, logs and sweeps."""

import csv
import os
import signal

import pytest
from hostile_runs import SHORT, run
from PIL import Image

from twoview.files import write_csv
from twoview.methods import SimCLR

# Cell, and how it is written.
CELLS = {
    "=1+1": "'=1+1",
    "+cmd": "'+cmd",
    "-cmd|' /C calc'!A0": "'-cmd|' /C calc'!A0",
    "@SUM(A1)": "'@SUM(A1)",
    "\t=1": "\\t=1",
    "a\x1b[31m": "a\\x1b[31m",
    "two\r\nlines": "two\\r\\nlines",
    "\x00\x7f\x9b": "\\x00\\x7f\\x9b",
    "-0.5": "-0.5",
    "+1e-3": "+1e-3",
    "-inf": "-inf",
    "a=b": "a=b",
    'Münch, "en"': 'Münch, "en"',
    "": "",
}


def test_cells_are_neither_formulas_nor_control_characters(tmp_path):
    write_csv(tmp_path / "table.csv", [["name", "number"], *([cell, -0.5] for cell in CELLS)])
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    assert rows == [[written, "-0.5"] for written in CELLS.values()]


def test_a_sweep_without_linear_probe_selects_by_knn(tmp_path):
    work = tmp_path / "work"
    found = run(work, "-m", "seed=0,1", *SHORT, "eval.parts=[knn]", "hydra.sweep.dir=runs/sweep")
    assert (found.code, found.outside) == (0, []), found
    assert "val/knn_top1 of 2 runs" in found.out
    (table,) = (work / "runs").glob("sweep/*/table.csv")
    with table.open() as file:
        assert all(0 < float(row["val/knn_top1"]) <= 1 for row in csv.DictReader(file))


def test_a_sweep_in_which_every_run_fails_has_a_table(tmp_path):
    found = run(tmp_path / "work", "-m", "method.temperature=0,-1", *SHORT, "hydra.sweep.dir=runs/sweep")
    assert found.code == 1
    assert "metric of 2 runs" in found.out
    assert "Traceback" not in found.out + found.err


def test_names_that_are_not_text_are_logged(tmp_path):
    folder = tmp_path / "work" / "runs" / "images"
    folder.mkdir(parents=True)
    for i in range(120):
        Image.new("L", (16, 16), i).save(folder / f"{i}.png")
    bad = os.fsencode(folder) + b"/\xff\xfe.png"
    with open(bad, "wb") as file:
        file.write(b"no image")
    knobs = ("data=folder", f"data.root={folder}", "data.batch_size=32", "data.channels=1")
    found = run(tmp_path / "work", *knobs, *SHORT)
    assert (found.code, found.err, found.outside) == (0, "", []), found
    text = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "work").rglob("broken.txt"))
    assert "\\udcff\\udcfe.png" in text


def test_a_root_that_is_not_text_is_used(tmp_path):
    folder = os.fsencode(tmp_path / "work" / "runs") + b"/\xff"
    os.makedirs(folder)
    for i in range(64):
        Image.new("L", (16, 16), i).save(os.fsdecode(folder) + f"/{i}.png")
    knobs = ("data=folder", f"data.root={os.fsdecode(folder)}", "data.batch_size=32", "data.channels=1")
    found = run(tmp_path / "work", *knobs, *SHORT)
    assert (found.code, found.err, found.outside) == (0, "", []), found


def press_twice():
    def after_update(self, progress):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    SimCLR.after_update = after_update


@pytest.mark.parametrize("sweep", [False, True])
def test_a_second_interrupt_stops_at_once(sweep, tmp_path):
    flags = ("-m", "hydra.sweep.dir=runs/sweep") if sweep else ()
    found = run(tmp_path / "work", *flags, *SHORT, prepare=press_twice)
    assert found.refused("stopped at once; continue with resume=", code=130), found
