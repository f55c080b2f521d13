"""One evaluation, its report in three forms, and comparisons."""

import csv
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SIZE, short_data
from safetensors.torch import load_file

from twoview import records, runs
from twoview.augment import TwoViews
from twoview.backbones import build_arguments, create_backbone
from twoview.data import ImageArrays, ImageData
from twoview.errors import UserError
from twoview.evaluate import Protocol
from twoview.evaluate.structure import geometry
from twoview.judging import FULL

QUICK = replace(FULL, l2=(1e-2, 1e-3), k=(1, 5), bootstrap=200, shift_images=60, draws=2)
AUGMENT = partial(TwoViews, crop_scale=(0.4, 1.0), flip=0.0, blur=0.0)
EVIL = "<script>alert('x')</script>|`a`&\n_b_"


def evaluate(folder, checkpoint, data=short_data, protocol=QUICK, **changes):
    return runs.evaluate(checkpoint, data, protocol, AUGMENT, run_dir=folder, **changes)


@pytest.fixture(scope="session")
def evaluated(finished, tmp_path_factory):
    """A full evaluation of the finished run: its folder, its report, and the cache that it left."""
    folder = tmp_path_factory.mktemp("evaluated")
    protocol = replace(QUICK, cache=str(folder / "cache"))
    report = evaluate(folder / "run", finished.folder, protocol=protocol)
    return SimpleNamespace(folder=folder / "run", report=report, protocol=protocol)


def test_an_evaluation_says_all_that_it_promises(evaluated):
    report = json.loads((evaluated.folder / "report.json").read_text())
    assert report == evaluated.report
    assert set(report["results"]) == {"trained", "random initialisation", "raw pixels"}
    for name, row in report["results"].items():
        expected = {"linear", "linear_without_bn", "knn", "few_labels", "retrieval", "clustering", "geometry"}
        assert set(row) == expected | ({"invariance"} if name != "raw pixels" else set())
        for probe in ("linear", "linear_without_bn", "knn"):
            low, high = row[probe]["interval"]
            assert 0 <= low <= row[probe]["test_top1"] <= high <= 1
        assert set(row["few_labels"]) == {"1 per class", "5 per class", "10 per class", "1 %", "10 %"}
    assert report["results"]["trained"]["geometry"]["diagnosis"] == "healthy"
    assert report["integrity"]["shared"] == {"train": {"exact": 0, "near": 0}}
    assert report["classes"] == [str(i) for i in range(10)]
    assert {"schema", "command", "commit", "versions", "hardware", "seed", "protocol", "test_fingerprint"} <= set(
        report
    )
    predictions = load_file(evaluated.folder / "predictions.safetensors")
    assert set(predictions) == {"labels", "linear", "linear_without_bn", "knn"}
    for probe in ("linear", "knn"):
        right = float((predictions[probe] == predictions["labels"]).double().mean())
        assert right == report["results"]["trained"][probe]["test_top1"]
    with (evaluated.folder / "confusion.csv").open() as file:
        rows = list(csv.reader(file))
    assert sum(int(rows[i + 1][i + 1]) for i in range(10)) == (predictions["linear"] == predictions["labels"]).sum()
    splits = json.loads((evaluated.folder / "few_labels.json").read_text())
    assert [len(draw) for draw in splits["5 per class"]] == [50, 50]


def test_the_schema_is_documented(evaluated):
    text = (runs.Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()

    def keys(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key
                yield from keys(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from keys(inner)

    free = {"trained", "random initialisation", "raw pixels", *evaluated.report["versions"], *vars(QUICK)}
    free |= set(evaluated.report["backbone"]) | {"1 per class", "5 per class", "10 per class", "1 %", "10 %"}
    missing = {key for key in keys(evaluated.report) if f"`{key}`" not in text} - free
    assert not {key for key in missing if "@" not in key and not key.startswith("val/")}


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
    assert not {"script", "iframe", "link"} & set(page.tags) - {"link"}
    assert "url(" not in (evaluated.folder / "report.html").read_text().split("</style>")[0]
    text = " ".join(page.text)
    for title in (
        "Training",
        "Spectrum",
        "Confusion",
        "Map of the features",
        "Views",
        "Nearest neighbours",
        "Few labels",
    ):
        assert title in text
    assert page.tags.count("img") == 5 + 12 * 7
    assert evaluated.report["command"] in text


def test_markdown_holds_the_same_figures(evaluated):
    text = (evaluated.folder / "report.md").read_text()
    top1 = evaluated.report["results"]["trained"]["linear"]["test_top1"]
    assert f"{100 * top1:.1f} %" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 60
    for title in ("Few labels", "Retrieval", "Clustering", "Geometry", "Invariance", "Integrity", "How to repeat it"):
        assert f"\n## {title}\n" in text


def test_a_second_evaluation_takes_what_the_first_left(evaluated, finished, tmp_path, caplog):
    caplog.set_level("INFO")
    again = evaluate(tmp_path, finished.folder, protocol=evaluated.protocol)
    assert caplog.text.count("computed before") == 4  # features of both splits, two baselines
    assert again["results"] == evaluated.report["results"]


def test_a_broken_cache_is_no_trouble(evaluated, finished, tmp_path, caplog):
    shutil.copytree(evaluated.protocol.cache, tmp_path / "cache")
    for number, file in enumerate(sorted((tmp_path / "cache").iterdir())):
        file.write_bytes(file.read_bytes()[: 100 * number])
    protocol = replace(evaluated.protocol, cache=str(tmp_path / "cache"))
    again = evaluate(tmp_path / "run", finished.folder, protocol=protocol)
    assert caplog.text.count("it is computed anew") >= 4
    assert again["results"] == evaluated.report["results"]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_said_and_nothing_is_lost(finished, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    protocol = replace(QUICK, parts=("knn",), cache=str(tmp_path / "file"), baselines=False)
    assert "knn" in evaluate(tmp_path / "run", finished.folder, protocol=protocol)["results"]["trained"]
    assert "nothing can be kept there" in caplog.text


def relabelled(labels, **changes):
    data = short_data()
    test = data.test.with_labels(labels(data.test.labels))
    return ImageData(data.train, data.train, test, data.classes, 128, **({"name": "digits"} | changes))


def shuffled(labels):
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def test_shuffled_test_labels_change_no_choice(evaluated, finished, tmp_path):
    protocol = replace(QUICK, baselines=False, parts=[p for p in QUICK.parts if p not in ("invariance", "integrity")])
    wrong = evaluate(tmp_path, finished.folder, relabelled(shuffled), protocol)
    right, found = evaluated.report["results"]["trained"], wrong["results"]["trained"]
    for probe in ("linear", "linear_without_bn", "knn"):
        for choice in {"val_top1", "l2", "k", "temperature", "converged"} & right[probe].keys():
            assert found[probe][choice] == right[probe][choice]
        assert found[probe]["test_top1"] < 0.3
    assert wrong["figures"] == evaluated.report["figures"]
    ours, theirs = (load_file(folder / "predictions.safetensors") for folder in (evaluated.folder, tmp_path))
    assert all(torch.equal(ours[probe], theirs[probe]) for probe in ours if probe != "labels")
    labels_free = ("spectrum", "effective_rank", "alignment", "uniformity", "decay")
    assert all(found["geometry"][name] == right["geometry"][name] for name in labels_free)


def test_duplicates_are_listed_and_left_out(finished, tmp_path):
    data = short_data()
    test = ImageArrays(
        torch.cat([data.train.pixels[:7], data.test.pixels]),
        torch.cat([data.train.labels[:7], data.test.labels]),
        names=[EVIL, *(f"picture {i}.png" for i in range(1, 457))],
    )
    planted = ImageData(data.train, data.train, test, [EVIL, *data.classes[1:]], 128, name=EVIL)
    protocol = replace(QUICK, baselines=False, parts=("linear", "knn", "integrity"))
    report = evaluate(tmp_path, finished.folder, planted, protocol)
    assert report["integrity"]["shared"] == {"train": {"exact": 7, "near": 0}}
    assert report["integrity"]["test_images_left"] == 450
    predictions = load_file(tmp_path / "predictions.safetensors")
    right = (predictions["knn"] == predictions["labels"])[7:].double().mean()
    assert report["integrity"]["top1_without_shared"]["knn"] == pytest.approx(float(right))
    with (tmp_path / "shared_images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["test"], int(row["train position"])) for row in rows][:2] == [(EVIL, 0), ("picture 1.png", 1)]
    # Names of files and classes are text, whatever they hold.
    page = Page()
    html = (tmp_path / "report.html").read_text()
    page.feed(html)
    assert "script" not in page.tags
    assert "<script>" not in html
    assert "<script>" in " ".join(page.text)
    table = (tmp_path / "report.md").read_text()
    assert "<script>" not in table
    assert (
        len({line.count(" | ") for line in table.split("## Shared images")[1].splitlines() if "picture" in line}) == 1
    )


def test_unlabelled_images_that_were_learned_from_are_compared_too(finished, tmp_path):
    data = short_data()
    learned = ImageArrays(
        torch.cat([data.train.pixels, data.test.pixels[:5]]), torch.cat([data.train.labels, torch.full((5,), -1)])
    )
    leaky = ImageData(learned, data.train, data.test, data.classes, 128)
    report = evaluate(tmp_path, finished.folder, leaky, replace(QUICK, baselines=False, parts=("knn", "integrity")))
    assert report["integrity"]["shared"]["pretrain"] == {"exact": 5, "near": 0}


def test_a_test_set_of_one_class_is_judged(finished, tmp_path):
    data = short_data()
    one = data.test.subset(torch.nonzero(data.test.labels == 3).flatten())
    report = evaluate(tmp_path, finished.folder, ImageData(data.train, data.train, one, data.classes, 128))
    row = report["results"]["trained"]
    assert row["linear"]["balanced"] == pytest.approx(row["linear"]["test_top1"])
    assert row["retrieval"]["mean_average_precision"] == 1
    assert row["linear"]["per_class"].count(None) == 9


def test_data_of_one_class_are_judged(finished, tmp_path):
    data = short_data()
    train, test = (x.with_labels(torch.zeros(len(x), dtype=torch.long)) for x in (data.train, data.test))
    report = evaluate(tmp_path, finished.folder, ImageData(train, train, test, ["all\udcff\x01"], 128))
    assert report["results"]["trained"]["linear"]["test_top1"] == 1
    assert (tmp_path / "report.html").exists()


def test_turned_images_are_other_images(evaluated, finished, tmp_path):
    data = short_data()
    turned = ImageArrays(data.test.pixels.rot90(2, (2, 3)).contiguous(), data.test.labels)
    assert data.test.moments()[:, :2].sum() == pytest.approx(float(turned.moments()[:, :2].sum()))
    protocol = replace(evaluated.protocol, parts=("knn",), baselines=False)
    report = evaluate(tmp_path, finished.folder, ImageData(data.train, data.train, turned, data.classes, 128), protocol)
    assert report["results"]["trained"]["knn"]["test_top1"] < 0.7
    assert report["test_fingerprint"] != evaluated.report["test_fingerprint"]


def test_the_baseline_of_a_network_with_weights_is_the_same_network(tmp_path):
    network, _ = create_backbone("test_vit", 3, 32, small_patches=False)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    loaded, _ = create_backbone("test_vit", 3, 32, weights=tmp_path / "weights.pt")
    again, _ = create_backbone(**build_arguments(loaded))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in loaded.state_dict().items()}
    smaller, _ = create_backbone("test_vit", 3, 32)
    assert smaller.patch_embed.patch_size != loaded.patch_embed.patch_size


def test_another_architecture_is_refused(finished, tmp_path):
    content = torch.load(finished.folder / "checkpoints" / "last.ckpt", weights_only=True)
    content["twoview"]["backbone"] |= {"name": "test_vit", "stem": "timm"}
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="its weights do not fit test_vit"):
        evaluate(tmp_path / "run", tmp_path / "other.ckpt")
    assert not (tmp_path / "run").exists()


def test_features_that_are_not_finite_are_refused(finished, tmp_path):
    content = torch.load(finished.folder / "checkpoints" / "last.ckpt", weights_only=True)
    name = next(k for k in content["state_dict"] if k.startswith("method.backbone.") and k.endswith("weight"))
    content["state_dict"][name][0] = float("nan")
    torch.save(content, tmp_path / "diverged.ckpt")
    with pytest.raises(UserError, match="450 of 450|1347 of 1347 images get features that are not finite"):
        evaluate(tmp_path / "run", tmp_path / "diverged.ckpt")


def test_timm_and_random_networks_are_judged(tmp_path):
    network, _ = create_backbone("test_resnet", 1, SIZE, stem="timm")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    data = partial(short_data, image_size=SIZE, channels=1)
    short = replace(QUICK, parts=("knn", "geometry"), baselines=False)
    report = evaluate(tmp_path / "a", "timm:test_resnet", data, short, weights=tmp_path / "weights.pt")
    assert report["method"] == "timm test_resnet"
    assert report["backbone"]["stem"] == "timm"
    first, again = (evaluate(tmp_path / name, "random:test_resnet", data, short) for name in "bc")
    assert first["results"] == again["results"]
    assert first["method"] == "random test_resnet"
    # The same network as its own baseline: two columns, the same figures.
    report = evaluate(tmp_path / "d", "random:test_resnet", data, replace(short, baselines=True))
    assert report["results"]["trained"] == report["results"]["random initialisation"]
    assert "| random test\\_resnet | random initialisation | raw pixels |" in (tmp_path / "d" / "report.md").read_text()


@pytest.mark.parametrize(
    ("checkpoint", "weights", "words"),
    [
        ("timm:resnet19", None, "checkpoint=timm:resnet19: timm has no published weights of that name; did you mean"),
        ("timm:test_resnet", "missing.pt", "weights=missing.pt: there is no such file"),
        ("random:resnet10", None, "give data.image_size=N"),
        ("runs/none", None, "checkpoint=runs/none: there is no checkpoint"),
        ("runs/none", "w.pt", "weights=w.pt: goes with checkpoint=timm:NAME"),
    ],
)
def test_checkpoints_that_are_none_are_sentences(checkpoint, weights, words, tmp_path):
    with pytest.raises(UserError, match=re.escape(words)):
        evaluate(tmp_path / "run", checkpoint, weights=weights)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def two_runs(finished, tmp_path_factory):
    """The finished run and random initialisation, judged by kNN and a linear probe."""
    folder = tmp_path_factory.mktemp("compared")
    short = replace(QUICK, parts=("linear", "knn", "geometry"), baselines=False)
    evaluate(folder / "a", finished.folder, protocol=short)
    evaluate(folder / "b", "random:test_resnet", partial(short_data, image_size=SIZE, channels=1), short)
    return folder


def test_a_comparison_has_paired_intervals(two_runs, tmp_path):
    report = runs.compare([two_runs / "a", two_runs / "b"], run_dir=tmp_path)
    assert report == json.loads((tmp_path / "report.json").read_text())
    a, b = (load_file(two_runs / name / "predictions.safetensors") for name in "ab")
    found = report["runs"][1]["differences"]["knn"]
    paired = ((b["knn"] == b["labels"]).double() - (a["knn"] == a["labels"]).double()).numpy()
    assert found["difference"] == pytest.approx(paired.mean())
    generator = np.random.default_rng(1)
    means = [paired[generator.integers(0, len(paired), len(paired))].mean() for _ in range(2000)]
    assert found["interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)
    assert report["runs"][0]["differences"]["knn"] == {"difference": 0, "interval": [0, 0]}
    for name in ("report.md", "report.html"):
        assert f"{100 * paired.mean():+.1f}" in (tmp_path / name).read_text()


def test_runs_that_cannot_be_compared_are_refused(two_runs, finished, tmp_path):
    short = replace(QUICK, parts=("knn",), baselines=False)
    evaluate(tmp_path / "other", finished.folder, relabelled(shuffled, name="others"), short)
    (tmp_path / "empty").mkdir()
    shutil.copytree(two_runs / "a", tmp_path / "broken")
    (tmp_path / "broken" / "report.json").write_text('{"task": ')
    for given, words in (
        ([two_runs / "a", tmp_path / "other"], "was judged on other test images"),
        ([two_runs / "a", tmp_path / "empty"], "has no report.json with predictions.safetensors"),
        ([two_runs / "a", tmp_path / "broken"], "cannot be read"),
        ([two_runs / "a"], "give two or more"),
        (str(two_runs / "a"), "give two or more"),
    ):
        with pytest.raises(UserError, match=words):
            runs.compare(given, run_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_probes_alone_measure_nothing_else(finished, tmp_path):
    protocol = Protocol(l2=(1e-2,), baselines=False, sgd_epochs=1)
    report = runs.linear_probe(finished.folder, short_data, protocol, run_dir=tmp_path)
    assert set(report["results"]["trained"]) == {"linear"}
    report = runs.linear_probe(
        finished.folder, short_data, replace(protocol, parts=("linear_sgd",)), run_dir=tmp_path / "sgd"
    )
    assert set(report["results"]["trained"]) == {"linear_sgd"}
    assert set(runs.knn(finished.folder, short_data, protocol, run_dir=tmp_path)["results"]["trained"]) == {"knn"}


def test_figures_that_are_not_finite_are_null(tmp_path):
    written = records.write({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (2, None)}}, tmp_path)
    assert written == {"a": None, "b": [1.5, None], "c": {"d": [2, None]}}
    assert json.loads((tmp_path / "report.json").read_text()) == written


def test_the_effective_rank_is_that_of_all_classes_in_whichever_order_they_lie():
    generator = torch.Generator().manual_seed(0)
    # Each of eight classes lies in a plane of its own; sorted by class, as a folder is.
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    parts = [torch.randn(300, 2, generator=generator) @ basis[2 * c : 2 * c + 2] for c in range(8)]
    assert geometry(torch.cat(parts))["effective_rank"] > 15
