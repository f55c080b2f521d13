"""Drift between two sets of embeddings: the report, the page, what is refused, and the exit code."""

import json
import os
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hostile_runs import run
from PIL import Image

from twoview import load, metrics
from twoview.data import folder
from twoview.errors import UserError
from twoview.evaluation.retrieval import retrieval_figures
from twoview.tools import DriftSettings, drift, embed
from twoview.tools.embedding_file import Embeddings

QUICK = DriftSettings(permutations=199, splits=20, listed=5)
UNSAFE = "<script>alert(1)</script> it's ä, =1.jpg"


def vectors(seed, rows=100, width=4):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def embeddings(found, labels=None, paths=None, **metadata):
    count = len(found)
    known = {"checkpoint": "abc"} | metadata
    return Embeddings(paths or [""] * count, torch.arange(count), labels or [None] * count, found, known)


def photos(root, brightness, seed, images=40):
    """Files of noise, of two classes."""
    generator = np.random.default_rng(seed)
    for number in range(images):
        pixels = generator.integers(0, 200, (24, 24, 3)) + brightness
        file = root / "ab"[number % 2] / (f"{number}.png" if number else UNSAFE)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return partial(folder, root=str(root), num_workers=0, cache=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with files of embeddings of images: a.parquet, another sample as b.parquet, brighter as c.parquet."""
    root = tmp_path_factory.mktemp("drift")
    encoder = load("random:test_resnet", image_size=24)
    for seed, (name, brightness) in enumerate({"a": 0, "b": 0, "c": 50}.items()):
        embed(encoder, photos(root / f"images {name}", brightness, seed), root / f"{name}.parquet")
    return root


@pytest.fixture(scope="module")
def drifted(files):
    """The report of brighter images, and its folder."""
    place = files / "drifted"
    return drift(files / "a.parquet", files / "c.parquet", QUICK, run_dir=place), place


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_brighter_images_are_drift_and_another_sample_is_not(files, drifted, tmp_path):
    report, place = drifted
    assert (report["drift"], report["exit_code"]) == (True, 3)
    assert json.loads((place / "drift.json").read_text()) == report
    assert report["tests"]["mmd"]["p"] == 1 / 200
    assert report["tests"]["mmd"]["adjusted_p"] == 3 / 200
    alarms = report["false_alarms"]
    assert (alarms["splits"], alarms["images"]) == (20, 20)
    assert alarms["interval"][0] <= alarms["alarms"] / 20 <= alarms["interval"][1]
    same = drift(files / "a.parquet", files / "b.parquet", QUICK, run_dir=tmp_path)
    assert (same["drift"], same["exit_code"]) == (False, 0)
    assert "may be due to chance" in (tmp_path / "drift.html").read_text()


def test_the_page_shows_images_needs_no_other_file_and_escapes_names(drifted):
    report, place = drifted
    assert any(UNSAFE in row["image"] for row in report["changed"]["current"] + report["changed"]["reference"]) or any(
        UNSAFE in name for row in report["clusters"] for name in row["examples"]
    )
    text = (place / "drift.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "<script>" in " ".join(page.text)
    assert all(source.startswith("data:") for source in page.sources)
    assert "url(" not in text
    assert page.tags.count("img") == 5 + 5 + 1  # of both sets, and the map
    for line in ("Tests", "Clusters", "Embeddings", "Current images least like the reference", "False alarms on"):
        assert line in " ".join(page.text)


def test_images_that_cannot_be_opened_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "fifo.png")
    names = [str(tmp_path / "text.png"), str(tmp_path / "fifo.png"), "/dev/zero", "relative.png", "/" + "x" * 5000]
    paths = [names[row % len(names)] for row in range(100)]
    drift(embeddings(vectors(0), paths=paths), embeddings(vectors(1), paths=paths), QUICK, run_dir=tmp_path)
    page = Page((tmp_path / "drift.html").read_text())
    assert page.tags.count("img") == 1
    assert "cannot be read" in " ".join(page.text)


def test_the_same_input_and_seed_give_the_same_report(files, drifted, tmp_path):
    pair = (files / "a.parquet", files / "c.parquet")
    drift(*pair, QUICK, to=tmp_path / "again", run_dir=tmp_path / "unused")
    drift(*pair, QUICK, seed=1, run_dir=tmp_path / "other")
    reports = [(place / "drift.json").read_bytes() for place in (drifted[1], tmp_path / "again", tmp_path / "other")]
    assert reports[0] == reports[1] != reports[2]
    assert not (tmp_path / "unused").exists()


def test_images_of_a_new_kind_are_the_first_of_the_list(tmp_path):
    current = vectors(1, 300, 16)
    planted = [7, 20, 64, 65, 90, 101, 110, 130, 170, 200, 205, 222, 230, 250, 299]
    current[planted] = vectors(2, 15, 16) / 10 + 5
    paths = [f"photo {row}" for row in range(300)]
    # All images are considered, whether they are in the sample or not.
    settings = DriftSettings(permutations=199, splits=0, max_images=100, listed=15)
    found = drift(embeddings(vectors(0, 300, 16)), embeddings(current, paths=paths), settings, run_dir=tmp_path)
    assert {row["image"] for row in found["changed"]["current"]} == {paths[row] for row in planted}
    assert found["changed"]["reference"][0]["image"].startswith("row ")
    assert found["sets"]["current"] == found["sets"]["current"] | {"images": 300, "compared": 100, "retrieval": None}
    assert found["false_alarms"] is None


def test_the_cluster_of_a_new_kind_has_changed_most(tmp_path):
    current, paths = vectors(1, 200, 16), [f"photo {row}" for row in range(200)]
    current[:40] = vectors(2, 40, 16) / 10 + 5
    settings = DriftSettings(permutations=99, splits=0)
    found = drift(embeddings(vectors(0, 200, 16)), embeddings(current, paths=paths), settings, run_dir=tmp_path)
    first, *others = found["clusters"]
    assert (first["reference"], first["current"]) == pytest.approx((0, 0.2), abs=0.02)
    assert set(first["examples"]) <= set(paths[:40])
    for name in ("reference", "current"):
        assert sum(row[name] for row in found["clusters"]) == pytest.approx(1)
    changes = [abs(row["current"] - row["reference"]) for row in others]
    assert changes == sorted(changes, reverse=True)


def test_quality_is_measured_on_equal_numbers_with_labels_in_both_sets(tmp_path):
    labels = [["cat", "dog", None][row % 3] for row in range(90)]
    first, second = vectors(0, 90), vectors(1, 60)
    pair = embeddings(first, labels), embeddings(second, labels[:60])
    found = drift(*pair, DriftSettings(permutations=99, splits=0), run_dir=tmp_path)["sets"]
    numbers = torch.tensor([row % 3 for row in range(60) if row % 3 < 2])
    kept = torch.tensor([row for row in range(60) if row % 3 < 2])
    expected = retrieval_figures(second[kept], numbers)
    assert found["current"]["retrieval"] == pytest.approx(expected, abs=1e-6)
    assert found["reference"]["retrieval"]["queries"] == 40  # of 60 images with a label
    assert found["current"]["effective_rank"] == pytest.approx(metrics.effective_rank(second), abs=1e-4)
    assert found["current"]["uniformity"] == pytest.approx(metrics.uniformity(second), abs=1e-5)
    unlabelled = drift(pair[0], embeddings(second), DriftSettings(permutations=99, splits=0), run_dir=tmp_path)
    assert unlabelled["sets"]["reference"]["retrieval"] is None


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e30, 1e300])
@pytest.mark.parametrize("width", [1, 3])
def test_vectors_without_variance_and_of_extreme_size(scale, width, tmp_path):
    settings, pair = DriftSettings(permutations=99, splits=5), [scale * vectors(i, 30, width).double() for i in (0, 1)]
    if scale == 1e300:
        with pytest.raises(UserError, match="reference: vectors: 30 of 30 are not finite"):
            drift(*pair, settings, run_dir=tmp_path)
        return
    found = drift(*pair, settings, run_dir=tmp_path)
    assert not found["drift"]
    assert (found["tests"]["mmd"]["p"] == 1) == (scale == 0)
    shown = Page((tmp_path / "drift.html").read_text()).tags.count("img")
    assert shown == (width > 1 and scale > 0)


NAN = vectors(0)
NAN[3, 1] = torch.nan
REFUSED = {
    "checkpoint": (embeddings(vectors(0), checkpoint="xyz"), "current: is of checkpoint xyz, the reference of abc"),
    "preprocessing": (embeddings(vectors(0), preprocessing={"image_size": 64}), "current: is of preprocessing"),
    "width": (embeddings(vectors(0, width=5)), "current: has vectors of 5 dimensions, the reference of 4"),
    "no checkpoint": (embeddings(vectors(0), checkpoint=None), "current: embeddings: do not name their checkpoint"),
    "few": (vectors(0, 19), "current: has 19 images; at least 20 are needed"),
    "empty": (vectors(0, 0), "current: has 0 images; at least 20 are needed"),
    "not finite": (NAN, "current: vectors: 1 of 100 are not finite, such as row 3"),
    "numpy not finite": (NAN.numpy(), "current: vectors: 1 of 100 are not finite"),
    "integers": (vectors(0).long(), r"current: vectors: give floating point numbers \[N, D\], not torch.int64"),
    "one dimension": (vectors(0)[:, 0], r"current: vectors: give floating point numbers \[N, D\]"),
    "no dimension": (vectors(0)[:, :0], r"current: vectors: give floating point numbers \[N, D\]"),
    "missing file": ("nowhere.parquet", "current=nowhere.parquet: cannot be read as Parquet"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_compared_is_refused_by_one_sentence(kind, tmp_path):
    other, message = REFUSED[kind]
    first = embeddings(vectors(0), preprocessing={"image_size": 32})
    with pytest.raises(UserError, match=message):
        drift(first, other, QUICK, run_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"level": 0.0}, "level=0.0: give a probability from 0.001 to 0.5"),
        ({"level": True}, "level=True"),
        ({"level": 0.01, "permutations": 298}, "permutations=298: give a whole number from 299 to 100,000, for level"),
        ({"splits": -1}, "splits=-1: give a whole number from 0"),
        ({"max_images": 10}, "max_images=10: give a whole number from 20 to 20,000"),
        ({"clusters": 1}, "clusters=1: give a whole number from 2"),
        ({"listed": 2.5}, "listed=2.5: give a whole number from 0"),
    ],
)
def test_wrong_settings_are_one_sentence(knobs, message):
    with pytest.raises(UserError, match=message):
        DriftSettings(**knobs)


def test_level_and_permutations_at_their_limits():
    assert DriftSettings(level=0.001, permutations=2999).permutations == 2999
    assert DriftSettings(level=0.05, permutations=59).permutations == 59


def test_memory_is_checked_before_it_is_allocated(tmp_path):
    huge = torch.zeros(1).expand(20_000, 4)  # one number in memory
    with pytest.raises(UserError, match="max_images=20000: comparing 40,000 vectors: needs"):
        drift(huge, huge, DriftSettings(max_images=20_000), run_dir=tmp_path)


def test_a_process_exits_with_3(files):
    pair = [f"reference={files}/a.parquet", f"current={files}/c.parquet"]
    knobs = ["splits=0", "permutations=99", "to=report", "hydra.run.dir=run"]
    done = run(files, "task=drift", *pair, *knobs, limit=60)
    assert done.code == 3, done.err
    assert done.err == ""
    assert "drift: adjusted p values mmd 0.03" in " ".join(done.out.split())
    assert json.loads((files / "report" / "drift.json").read_text())["settings"]["permutations"] == 99
    assert sorted(os.listdir(files / "report")) == ["drift.html", "drift.json"]


def test_other_exit_codes(files, tmp_path):
    knobs = ["task=drift", f"reference={files}/a.parquet", "permutations=99", "splits=0"]
    same = run(tmp_path / "same", *knobs, f"current={files}/b.parquet", limit=60)
    assert same.code == 0, same.err
    wrong = run(tmp_path / "wrong", *knobs, f"current={tmp_path}", limit=60)
    assert wrong.refused(f"current={tmp_path}: cannot be read as Parquet")
    refused = run(tmp_path / "refused", *knobs, f"current={files}/b.parquet", "level=0.001", limit=60)
    assert refused.refused("permutations=99: give a whole number from 2,999 to 100,000")
    sweep = run(tmp_path / "sweep", "-m", *knobs, f"current={files}/c.parquet,{files}/b.parquet", limit=60)
    assert sweep.code == 0, sweep.err
    found = [json.loads(file.read_text())["exit_code"] for file in (tmp_path / "sweep").rglob("drift.json")]
    assert sorted(found) == [0, 3]
