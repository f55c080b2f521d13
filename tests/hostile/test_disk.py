"""Folders, files and standard outputs that cannot be written, and odd files that an earlier run left."""

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hostile_runs import SHORT, run

from twoview import files, runs
from twoview.evaluation.cache import cached
from twoview.files import read_csv, read_json, remove_left_over, write_atomically
from twoview.reporting.figures import curves
from twoview.training import pretraining

QUICK = (*SHORT, "data=fake", "data.images=64", "data.batch_size=32", "eval.parts=[knn]")
FOLDER = "hydra.run.dir=runs/r"


def limited(size):
    """Files of this process can have this many bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full_disk():
    """Data cannot be synchronized to disk."""

    def fails(handle):
        raise OSError(28, "No space left on device")

    files.os.fsync = fails


def a_file():
    Path("runs").mkdir()
    Path("runs/r").write_text("")


def vanishes(module, name):
    """The run folder becomes a file before a function of a module is called."""

    def prepare():
        before = getattr(module, name)

        def after(*arguments):
            shutil.rmtree("runs/r")
            Path("runs/r").write_text("")
            return before(*arguments)

        setattr(module, name, after)

    return prepare


def output(target):
    """Stdout is another file; "" for a pipe that nobody reads."""

    def prepare():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(os.open(target, os.O_WRONLY) if target else writer, 1)

    return prepare


# Arguments, what is prepared, and a part of the sentence.
REFUSED = {
    "folder is a file": ([FOLDER], a_file, "runs/r: File exists; choose another folder"),
    "folder below a file": (["hydra.run.dir=runs/r/below"], a_file, "runs/r/below: Not a directory"),
    "folder of the system": (["hydra.run.dir=/proc/r"], lambda: None, "/proc/r: No such file or directory"),
    "folder is a device": (["hydra.run.dir=/dev/null"], lambda: None, "/dev/null: File exists"),
    "long name": (["hydra.run.dir=runs/" + 300 * "r"], lambda: None, "File name too long"),
    "sweep folder is a file": (["-m", "seed=0,1", "hydra.sweep.dir=runs/r"], a_file, "runs/r: File exists"),
    "limit below config.yaml": ([FOLDER], limited(1500), "config.yaml: File too large; raise the limit"),
    "limit below the log": ([FOLDER], limited(6000), "File too large"),
    "limit below a checkpoint": ([FOLDER], limited(200_000), "best.ckpt could not be written (File too large)"),
    "limit of a sweep": (["-m", "seed=0,1", "hydra.sweep.dir=runs/s"], limited(1500), "File too large"),
    "full disk": ([FOLDER], full_disk, "No space left on device; free disk space"),
    "gone before training": ([FOLDER], vanishes(pretraining, "fit"), "runs/r: File exists; choose another folder"),
    "gone before the report": ([FOLDER], vanishes(runs, "_evaluate"), "runs/r: File exists; choose another folder"),
    "full stdout": ([FOLDER], output("/dev/full"), "stdout: No space left on device"),
    "broken pipe": ([FOLDER], output(""), "stdout: Broken pipe"),
    "help to a full stdout": (["--help"], output("/dev/full"), "stdout: No space left on device"),
    "help to a broken pipe": (["--help"], output(""), "stdout: Broken pipe"),
    "configuration to a broken pipe": (["--cfg", "job"], output(""), "stdout: Broken pipe"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_said_in_a_sentence(name, tmp_path):
    arguments, prepare, message = REFUSED[name]
    given = arguments if arguments[0].startswith("--") else [*arguments, *QUICK]
    found = run(tmp_path / "work", *given, prepare=prepare)
    assert found.refused(message), found
    if name in ("full stdout", "broken pipe"):
        assert (tmp_path / "work/runs/r/report.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def other_user():
    """The command runs as a user who has no rights beyond those of everybody."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def hidden():
    """Folders on the way to the interpreter and the package that another user may not enter."""
    starts = [Path(sys.prefix).resolve() / "bin", Path(files.__file__).resolve()]
    return [str(folder) for start in starts for folder in start.parents if not folder.stat().st_mode & 0o005]


@pytest.fixture
def public():
    """A folder that everybody can read, unlike those of pytest."""
    if hidden():
        pytest.skip(f"another user may not enter {', '.join(hidden())}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        (["runs/r"], [FOLDER]),
        (["runs"], [FOLDER]),
        (["runs"], ["-m", "seed=0,1", "hydra.sweep.dir=runs/s"]),
        (["runs/r", "runs/r/checkpoints"], ["resume=runs/r", "trainer.max_steps=3"]),
    ],
    ids=["run folder", "folder above", "sweep", "resume"],
)
def test_a_folder_that_may_not_be_written_is_said_in_a_sentence(names, arguments, public):
    work = public / "work"
    if arguments[0].startswith("resume"):
        assert run(work, FOLDER, *QUICK).code == 0
    for name in names:
        (work / name).mkdir(parents=True, exist_ok=True)
        (work / name).chmod(0o555)
    before = sorted(work.rglob("*"))
    given = arguments if arguments[0].startswith("resume") else [*arguments, *QUICK]
    found = run(work, *given, prepare=other_user)
    assert found.refused(": Permission denied; make it writable"), found
    assert "runs/" in found.err
    assert sorted(work.rglob("*")) == before


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Working folder with a finished run."""
    folder = tmp_path_factory.mktemp("disk") / "work"
    found = run(folder, FOLDER, *QUICK)
    assert found.code == 0, found
    return folder


@pytest.fixture
def copy(work, tmp_path):
    return shutil.copytree(work, tmp_path / "work")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(copy):
    before = (copy / "runs/r/checkpoints/last.ckpt").read_bytes()
    longer = ("resume=runs/r", "trainer.max_steps=4")
    found = run(copy, *longer, prepare=limited(200_000))
    assert found.refused("earlier checkpoints are unchanged"), found
    assert "continue with resume=" in found.err
    assert (copy / "runs/r/checkpoints/last.ckpt").read_bytes() == before
    assert run(copy, *longer).code == 0


OTHER = {
    "pretraining": ["seed=1", *QUICK],
    "evaluation": ["task=evaluate", "checkpoint=runs/r", "data=fake", "data.images=64", "data.batch_size=32"],
    "preview": ["task=preview", "data=fake"],
}


@pytest.mark.parametrize("name", OTHER)
def test_the_folder_of_another_finished_run_is_refused(name, work):
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*.*") if file.suffix in (".json", ".yaml", ".ckpt")}
    found = run(work, FOLDER, *OTHER[name])
    assert found.refused("hydra.run.dir=runs/r: this folder holds") or found.refused("runs/r: this folder holds"), found
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_the_same_run_is_not_repeated_and_rerun_overwrites(copy):
    report = copy / "runs/r/report.json"
    before = report.stat().st_mtime_ns
    assert run(copy, FOLDER, *QUICK).code == 0
    assert report.stat().st_mtime_ns == before
    assert run(copy, FOLDER, *QUICK, "seed=1", "rerun=true").code == 0
    assert json.loads(report.read_text())["seed"] == 1


def reduced(report, *keys):
    """A report in which the value of the last of nested keys is a string."""
    node = report
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = "odd"
    return json.dumps(report)


REPORTS = {
    "empty": lambda report: "",
    "odd results": lambda report: reduced(report, "results", "trained"),
    "odd interval": lambda report: reduced(report, "results", "trained", "knn", "interval"),
    "odd versions": lambda report: reduced(report, "versions"),
    "odd protocol": lambda report: reduced(report, "protocol"),
    "fifo": None,
}


@pytest.mark.parametrize("content", [b"", b"\xff\x00\x01", b"null", b"[1]", 100_000 * b"[", 10_000 * b"9"])
def test_other_content_than_a_json_object_is_a_value_error(content, tmp_path):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ValueError, match="."):
        read_json(tmp_path / "report.json")


@pytest.mark.parametrize("name", REPORTS)
def test_an_odd_report_is_replaced_by_the_next_run_and_refused_by_compare(name, copy):
    file = copy / "runs/r/report.json"
    text, make = file.read_text(), REPORTS[name]
    shutil.copytree(copy / "runs/r", copy / "runs/other")
    file.unlink()
    if make is None:
        os.mkfifo(file)
    else:
        file.write_text(make(json.loads(text)))
    if name not in ("odd versions", "odd protocol"):  # not read by compare
        found = run(copy, "task=compare", "runs=[runs/r,runs/other]", "hydra.run.dir=runs/both")
        assert found.refused("the report in runs/r cannot be read"), found
    assert run(copy, FOLDER, *QUICK).code == 0
    assert json.loads(file.read_text())["results"] == json.loads(text)["results"]


METRICS = [
    b"",
    b"step\n\x00",
    b"a,b\n1,2\n",
    b"step,train/loss\nx,y\n1,nan\n2,1e999\n",
    200_000 * b"x" + b"\n",
    b"\xff\n",
]


@pytest.mark.parametrize("content", METRICS)
def test_odd_metrics_are_not_drawn(content, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(content)
    curves(tmp_path / "metrics.csv")


@pytest.mark.parametrize("content", METRICS[-3:])
def test_odd_metrics_are_left_out_when_the_run_is_resumed(content, copy):
    file = copy / "runs/r/metrics.csv"
    file.write_bytes(content)
    assert run(copy, "resume=runs/r", "trainer.max_steps=3", "trainer.log_every=1").code == 0
    assert any(row["train/loss"] for row in read_csv(file))


def test_a_row_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss\n1,2\n3\n4,5,6\n7,8\n9,1")
    assert [row["step"] for row in read_csv(file)] == ["1", "7"]


def test_left_over_files_of_killed_writes_are_removed_by_the_next_start(copy):
    ours = [copy / "runs/r" / name for name in ("report.json.12.tmp", "checkpoints/last.ckpt.12.tmp")]
    kept = [copy / "runs/r" / name for name in ("mine.tmp", "12.tmp")]
    for file in (*ours, *kept):
        file.write_text("")
    assert run(copy, "resume=runs/r", "trainer.max_steps=3").code == 0
    assert [file.exists() for file in (*ours, *kept)] == [False, False, True, True]


def test_young_files_of_a_shared_folder_are_kept(tmp_path):
    young, old = tmp_path / "x.pt.1.tmp", tmp_path / "x.pt.2.tmp"
    for file in (young, old):
        file.write_text("")
    os.utime(old, (time.time() - 100,) * 2)
    remove_left_over(tmp_path, tmp_path / "missing", seconds=50)
    assert (young.exists(), old.exists()) == (True, False)


CACHES = {
    "another shape": lambda file: torch.save(torch.zeros(3), file),
    "another type": lambda file: torch.save({"x": 1}, file),
    "text": lambda file: file.write_text("x"),
    "fifo": os.mkfifo,
    "a folder": lambda file: file.mkdir(),
}


@pytest.mark.parametrize("name", CACHES)
def test_an_odd_cache_is_computed_again(name, tmp_path):
    CACHES[name](tmp_path / "key.pt")
    wanted = torch.arange(4)
    for _ in range(2):
        found = cached(
            str(tmp_path), lambda: "key", lambda: wanted, lambda x: isinstance(x, torch.Tensor) and len(x) == 4
        )
        assert torch.equal(found, wanted)


def test_a_failure_while_torch_writes_is_an_os_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_atomically(tmp_path / "x.pt", lambda file: torch.save(torch.zeros(10_000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())
