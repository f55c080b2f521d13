"""The guide for one's own images: its commands as they stand, read by bash, for folders with unusual names."""

import os
import re
import subprocess
from pathlib import Path

import hydra
import numpy as np
import pytest
from commands import ROOT
from hostile_runs import run
from PIL import Image

import twoview
from twoview.cli.overrides import CONF, check_overrides, quoted
from twoview.files import read_csv

GUIDE = (ROOT / "docs" / "your_own_pictures.md").read_text()
LABELS = ("Tiere = groß & klein", "Dinge, 100% (übrig)", "it's")


def section(title):
    """The bash blocks of a section, as one script."""
    text = GUIDE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))


def commands(script, home):
    """Arguments of each ``python train.py`` in a script, as bash passes them."""
    shown = "python() { printf '%s\\0' \"$@\"; printf '\\n\\0'; }\n"
    environment = os.environ | {"HOME": str(home), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shown + script], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [[]]
    for word in done.stdout.decode().split("\0")[:-1]:
        found.append([]) if word == "\n" else found[-1].append(word)
    assert all(words[0] == "train.py" for words in found[:-1])
    return [words[1:] for words in found[:-1]]


def draw(place, count, seed):
    """Pictures of coarse noise with unusual names; every class has its own hue."""
    rng = np.random.default_rng(seed)
    place.mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        pixels[..., seed % 3] //= 4
        picture = Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC)
        picture.save(place / f"Foto {i} (ü), schön's = 100%.png")


def run_guide(folder):
    """Run all commands of the guide; return the folder of the pictures, and how each command ended."""
    script = section("From a folder to search")
    pictures = folder / re.search(r'pictures="\$HOME/(.*)"', script)[1]
    for number, label in enumerate(LABELS):
        draw(pictures / label, 10, number)
    copy = pictures / LABELS[0] / "copy, of 1.jpg"
    Image.open(next((pictures / LABELS[0]).glob("Foto 1 *"))).save(copy, quality=80)
    found = commands(script, folder)
    return pictures, [(words, run(folder / "work", *words, limit=250)) for words in found]


@pytest.mark.timeout(900)  # seven commands
def test_every_command_of_the_guide_succeeds(tmp_path):
    pictures, ended = run_guide(tmp_path)
    tasks = [next((word for word in words if word.startswith("task=")), "task=pretrain") for words, _ in ended]
    wanted = ["pretrain", "evaluate", "export", "embed", "index", "search", "duplicates"]
    assert tasks == [f"task={task}" for task in wanted]
    for words, outcome in ended:
        assert outcome.code == 0, (words, outcome.err)
        assert "Traceback" not in outcome.out + outcome.err
    results = tmp_path / "twoview results"
    assert (results / "evaluation" / "report.html").exists()
    assert twoview.load(results / "backbone").width == twoview.load(results / "run").width
    rows = read_csv(results / "search" / "search.csv")
    assert rows[0]["query"] == rows[0]["path"] == min(map(str, pictures.rglob("*.*")))
    groups = read_csv(results / "duplicates" / "duplicates.csv")
    assert {Path(row["path"]).name for row in groups} >= {"copy, of 1.jpg", "Foto 1 (ü), schön's = 100%.png"}
    # The command that pretraining prints can be copied.
    line = re.search(r"^more: +twoview (.*)$", ended[0][1].out, re.M)[1]
    (words,) = commands(f"python train.py {line}", tmp_path)
    assert f"data.root={pictures}" in words
    check_overrides([quoted(word) for word in words])


def test_paths_are_read_as_the_guide_says():
    lines = section("Names with spaces, commas and other characters").splitlines()
    assert len(lines) > 4
    for line in lines:
        command, _, expected = line.rpartition("  # ")
        (words,) = commands(command, "/home/user")
        overrides = [quoted(word) for word in words]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            assert str(hydra.compose("config", overrides).data.root) == expected


def test_a_flat_folder_has_no_labels_and_goes_the_same_way(tmp_path):
    draw(tmp_path / "Blüten, rot", 12, 0)
    words = ["data.image_size=16", "trainer.max_steps=2", "backbone.name=test_resnet", "hydra.run.dir=./runs/Lauf, 1"]
    outcome = run(tmp_path, "data=folder", "data.root=./Blüten, rot", *words)
    assert outcome.code == 0, outcome.err
    outcome = run(tmp_path, "task=evaluate", "data=folder", "data.root=./Blüten, rot", "checkpoint=runs/Lauf, 1")
    assert outcome.refused("has no labels to fit and test a probe with; give folders of classes")
