"""``report.html`` and ``report.md``: self-contained, complete, and with every text escaped."""

import csv
from html.parser import HTMLParser

import pytest
import torch
from evaluation.helpers_evaluation import UNSAFE, evaluate, full_evaluation, quick
from safetensors.torch import load_file
from short_runs import short_data

from twoview.data import ImageData, TensorImages


@pytest.fixture(scope="module")
def evaluated(finished):
    return full_evaluation(finished.folder)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_no_other_file_and_no_network(evaluated):
    page = Page()
    page.feed((evaluated.folder / "report.html").read_text())
    assert all(source.startswith("data:") for source in page.sources)
    assert not {"script", "iframe"} & set(page.tags)
    assert "url(" not in (evaluated.folder / "report.html").read_text().split("</style>")[0]
    text = " ".join(page.text)
    figures = ("Training", "Spectrum", "Confusion", "Map of the features", "Views")
    for title in (*figures, "Nearest neighbors", "Few labels"):
        assert title in text
    assert page.tags.count("img") == len(figures) + 12 * 7  # and a gallery of 12 queries with 6 neighbors each
    assert evaluated.report["command"] in text


def test_markdown_has_the_same_figures(evaluated):
    text = (evaluated.folder / "report.md").read_text()
    top1 = evaluated.report["results"]["trained"]["linear"]["test_top1"]
    assert f"{100 * top1:.1f} %" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 60
    for title in ("Few labels", "Retrieval", "Clustering", "Geometry", "Invariance", "Integrity", "How to repeat it"):
        assert f"\n## {title}\n" in text


def test_shared_images_are_listed_and_names_are_escaped(finished, tmp_path):
    data = short_data()
    test = TensorImages(
        torch.cat([data.train.pixels[:7], data.test.pixels]),
        torch.cat([data.train.labels[:7], data.test.labels]),
        names=[UNSAFE, *(f"photo {i}.png" for i in range(1, 457))],
    )
    planted = ImageData(data.train, data.train, test, [UNSAFE, *data.classes[1:]], 128, name=UNSAFE)
    report = evaluate(tmp_path, finished.folder, planted, quick("linear", "knn", "integrity", baselines=False))
    assert report["integrity"]["shared"] == {"train": {"exact": 7, "near": 0}}
    assert report["integrity"]["test_images_left"] == 450
    predictions = load_file(tmp_path / "predictions.safetensors")
    right = (predictions["knn"] == predictions["labels"])[7:].double().mean()
    assert report["integrity"]["top1_without_shared"]["knn"] == pytest.approx(float(right))
    with (tmp_path / "shared_images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["test"], int(row["train position"])) for row in rows][:2] == [
        (UNSAFE.replace("\n", "\\n"), 0),  # control characters are escaped
        ("photo 1.png", 1),
    ]
    page = Page()
    html = (tmp_path / "report.html").read_text()
    page.feed(html)
    assert "script" not in page.tags
    assert "<script>" not in html
    assert "<script>" in " ".join(page.text)
    table = (tmp_path / "report.md").read_text()
    assert "<script>" not in table
    assert len({line.count(" | ") for line in table.split("## Shared images")[1].splitlines() if "photo" in line}) == 1
