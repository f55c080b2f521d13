"""Exported folders from anyone: they load as data or are refused, and nothing in them runs."""

import hashlib
import json
import os
import pickle
import re
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import twoview
from twoview.errors import UserError
from twoview.tools import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two exported folders by name."""
    folder = tmp_path_factory.mktemp("exports")
    for name in ("test_vit", "test_convnext"):
        export(twoview.load(f"random:{name}", 32), folder / name)
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of the exported ViT, to be damaged. Its load.py must never run."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in (exported / "test_vit").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "load.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    return folder


def changed(folder, **changes):
    """Change the entry "twoview" of config.json; the checksum fits the weights."""
    config = json.loads((folder / "config.json").read_text())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    config["twoview"] |= {"sha256": digest, **changes}
    (folder / "config.json").write_text(json.dumps(config))


def with_card(folder, **changes):
    card = json.loads((folder / "config.json").read_text())["twoview"]["card"]
    changed(folder, card=card | changes)


def with_options(folder, **options):
    card = json.loads((folder / "config.json").read_text())["twoview"]["card"]
    with_card(folder, backbone=card["backbone"] | {"options": options})


def with_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    changed(folder)


def with_content(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    changed(folder)


def with_link(folder, name):
    (folder / name).rename(folder / "elsewhere")
    (folder / name).symlink_to("elsewhere")


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def torch_file(content):
    file = BytesIO()
    torch.save(content, file)
    return file.getvalue()


def half(folder):
    return (folder / "model.safetensors").read_bytes()[:20000]


HOSTILE = {
    "cut off": lambda f: (f / "model.safetensors").write_bytes(half(f)),
    "cut off with its checksum": lambda f: with_content(f, half(f)),
    "one bit": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1] + b"x"),
    "pickle": lambda f: with_content(f, pickle.dumps(Payload())),
    "torch file": lambda f: with_content(f, torch_file({"norm.weight": torch.zeros(64)})),
    "torch pickle": lambda f: with_content(f, torch_file(Payload())),
    "endless header": lambda f: with_content(f, b"\xff" * 8 + b"{}"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "fifo": lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
    "wrong shape": lambda f: with_weights(f, lambda t: t.update({"norm.weight": torch.zeros(65)})),
    "wrong type": lambda f: with_weights(f, lambda t: t.update({"norm.weight": torch.zeros(64, dtype=torch.int8)})),
    "missing tensor": lambda f: with_weights(f, lambda t: t.pop("norm.weight")),
    "further tensor": lambda f: with_weights(f, lambda t: t.update({"x": torch.zeros(1)})),
    "link to weights": lambda f: with_link(f, "model.safetensors"),
    "link to config": lambda f: with_link(f, "config.json"),
    "link to nowhere": lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("missing")),
    "large config": lambda f: os.truncate(f / "config.json", 2**25),
    "nested config": lambda f: (f / "config.json").write_text("[" * 100_000),
    "list": lambda f: (f / "config.json").write_text("[]"),
    "config of timm": lambda f: (f / "config.json").write_text('{"architecture": "resnet18"}'),
    "no card": lambda f: changed(f, card=None),
    "card of texts": lambda f: with_card(f, mean="dark"),
    "large": lambda f: with_card(f, image_size=10**9),
    "folder of a name": lambda f: with_card(f, backbone={"name": f"local-dir:{f}", "in_chans": 1}),
    "download": lambda f: with_options(f, pretrained=True),
    "file": lambda f: with_options(f, checkpoint_path="/etc/passwd"),
    "source": lambda f: with_options(f, pretrained_cfg={"file": "/etc/passwd"}),
    "options": lambda f: with_options(f, no_such_argument=1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_are_refused_and_nothing_in_them_runs(copied, name, monkeypatch):
    monkeypatch.chdir(copied.parent)
    HOSTILE[name](copied)
    with pytest.raises(UserError, match=f"checkpoint={re.escape(str(copied))}") as error:
        twoview.load(copied)
    assert str(error.value).count("\n") == 0
    assert not Path("executed").exists()


def test_the_config_of_another_network_is_refused(exported, copied):
    other = json.loads((exported / "test_convnext" / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="model.safetensors is not the file that config.json describes"):
        twoview.load(copied)
    changed(copied)
    with pytest.raises(UserError, match="its weights do not fit this timm's test_convnext"):
        twoview.load(copied)


def test_code_in_a_folder_that_loads_is_not_executed(copied):
    assert twoview.load(copied).width == 64
    assert not (copied.parent / "executed").exists()
