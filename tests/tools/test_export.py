"""Export: the features in another process without twoview, hostile folders, and what is replaced."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from commands import environment
from hostile_runs import run
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import twoview
from twoview.backbones import create_backbone
from twoview.errors import UserError
from twoview.files import write_folder_atomically
from twoview.timm_folder import timm_config
from twoview.tools import export

SIZE = 32
# ResNet with a stem that timm cannot name, ResNet with the stem of timm, and other families.
NETWORKS = {"small_stem": "test_resnet", "vit": "test_vit", "convnext": "test_convnext"}
FORMS = {
    "small_stem": ("timm", "outside"),
    "vit": ("timm", "outside"),
    "convnext": ("timm", "outside"),
    "onnx_outside": ("onnx", "outside"),
    "onnx_inside": ("onnx", "inside"),
    "torch_inside": ("torch", "inside"),
}


def make_encoder(name="test_resnet", channels=3):
    """An untrained network whose parameters and statistics all differ from their initial values."""
    encoder = twoview.load(f"random:{name}", SIZE, channels)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in encoder.network.state_dict().values():
            if value.is_floating_point():
                value.add_(0.02 * torch.rand_like(value))
    return encoder.with_card(mean=(0.4,) * channels, std=(0.3,) * channels)


@pytest.fixture(scope="module")
def encoders():
    made = {key: make_encoder(name, channels=1 if key == "vit" else 3) for key, name in NETWORKS.items()}
    return made | dict.fromkeys(("onnx_outside", "onnx_inside", "torch_inside"), made["small_stem"])


@pytest.fixture(scope="module")
def exported(encoders, tmp_path_factory):
    """Exported folders by name, in a folder with a space and another script."""
    folder = tmp_path_factory.mktemp("exports") / "with space, é"
    for key, (form, preprocess) in FORMS.items():
        record = export(encoders[key], folder / key, form, preprocess)
        assert record["largest_difference"] <= (1e-4 if form == "onnx" else 1e-5) * max(1, record["largest_feature"])
    return folder


WITHOUT_TWOVIEW = """
import json, re, sys
sys.modules["twoview"] = None  # importing it fails
from pathlib import Path
import torch
from PIL import Image

root, found = Path(sys.argv[1]), {}
torch.set_grad_enabled(False)
for folder in sorted(root.iterdir()):
    code = re.search("```python\\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    names = {"image": Image.open(sys.argv[2]), "images": torch.load(sys.argv[3], weights_only=True)[folder.name]}
    if folder.name.startswith("onnx"):
        names["images"] = names["images"].numpy()
    exec(code.replace("FOLDER", str(folder)), names)
    found[folder.name] = torch.as_tensor(names["features"])
assert not any(name.split(".")[0] in ("lightning", "hydra") for name in sys.modules)
torch.save(found, sys.argv[4])
"""


def test_the_code_in_the_readme_gives_the_features_of_the_encoder_without_twoview(exported, encoders, tmp_path):
    pixels = torch.randint(0, 256, (SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy())
    image.save(tmp_path / "image.png")
    seven = torch.randint(0, 256, (7, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = {key: seven if form[1] == "inside" else encoders[key].preprocess(seven) for key, form in FORMS.items()}
    torch.save(images, tmp_path / "images.pt")
    paths = [str(tmp_path / name) for name in ("image.png", "images.pt", "found.pt")]
    command = [sys.executable, "-c", WITHOUT_TWOVIEW, str(exported), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for key, (form, _) in FORMS.items():
        expected = encoders[key](image if form == "timm" else seven)
        limit = (1e-4 if form == "onnx" else 1e-5) * max(1, expected.abs().max().item())
        assert found[key].shape == expected.shape
        assert (found[key] - expected).abs().max() <= limit, key


@pytest.mark.parametrize("key", NETWORKS)
def test_an_exported_folder_loads_as_the_same_encoder(exported, encoders, key):
    loaded = twoview.load(exported / key)
    images = [Image.effect_noise((50, 40), 80).convert("RGB"), Image.new("L", (20, 30), 77)]
    assert torch.equal(loaded(images), encoders[key](images))
    assert loaded.card == encoders[key].card
    assert loaded.source == str(exported / key / "model.safetensors")
    with pytest.raises(UserError, match="data.image_size=64: the checkpoint was made for 32"):
        twoview.load(exported / key, image_size=64)


def test_timm_refuses_a_network_that_it_cannot_name(exported):
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{exported / 'small_stem'}", pretrained=True)
    lines = (exported / "small_stem" / "load.py").read_text().splitlines()
    assert len(lines) < 20
    assert not (exported / "vit" / "load.py").exists()


def test_timm_adds_a_classifier_to_an_exported_network(exported):
    network = timm.create_model(f"local-dir:{exported / 'vit'}", pretrained=True, num_classes=5)
    assert network(torch.zeros(2, 1, SIZE, SIZE)).shape == (2, 5)
    weights = load_file(exported / "vit" / "model.safetensors")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in weights.items())


def test_a_run_is_exported_with_its_figures_and_without_paths(finished, tmp_path):
    record = export(twoview.load(finished.folder), tmp_path / "out", license="mit")
    top1 = finished.report["results"]["trained"]["linear"]["test_top1"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{100 * top1:.1f} %" in text
    assert "license: mit" in text.split("---")[1]
    assert f"| images seen | {finished.report['training']['images_seen']} |" in text
    assert record["card"]["classes"] == tuple("0123456789")
    assert f"{record['largest_difference']:.1e}" in text
    written = [text, (tmp_path / "out" / "config.json").read_text()]
    assert not any(str(tmp_path) in part or str(finished.folder.parent) in part for part in written)
    best = twoview.load(finished.folder / "checkpoints" / "best.ckpt")  # the report is about the last checkpoint
    export(best, tmp_path / "best")
    assert "None recorded" in (tmp_path / "best" / "README.md").read_text()


def test_names_from_a_checkpoint_do_not_change_the_readme(tmp_path):
    card = replace(make_encoder("test_vit").card, data="x\n# Title\n<script>", classes=("a|b", "`c`", "[d](e)"))
    export(twoview.Encoder(make_encoder("test_vit").network, card), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("\n# ") == 1
    assert "<script>" not in text
    assert "3: a\\|b, \\`c\\`, \\[d\\](e)" in text


def test_the_command_line_exports(exported, tmp_path):
    done = run(tmp_path, "task=export", "checkpoint=random:test_vit", "data.image_size=32", "to=München (1)", limit=60)
    assert done.code == 0, done.err
    assert "largest difference" in done.out + done.err
    assert sorted(f.name for f in (tmp_path / "München (1)").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_an_onnx_folder_is_named_when_it_is_loaded(exported):
    with pytest.raises(UserError, match="holds an export with format=onnx; give one with format=timm"):
        twoview.load(exported / "onnx_inside")


def contents(folder):
    return {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_only_an_earlier_export_is_replaced(encoders, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("pictures")
    (tmp_path / "nothing").symlink_to("missing")
    before = contents(tmp_path)
    for name, message in (
        ("pictures", "holds files that are not an export"),
        ("file", "is a file"),
        ("link", "is a symbolic link"),
        ("nothing", "is a symbolic link"),
    ):
        with pytest.raises(UserError, match=f"to=.*{name}: {message}"):
            export(encoders["vit"], tmp_path / name)
    assert contents(tmp_path) == before

    (tmp_path / "out").mkdir()  # an empty folder may be given
    export(encoders["small_stem"], tmp_path / "out")
    (tmp_path / "out" / "__pycache__").mkdir()
    export(encoders["vit"], tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"notes.txt would be lost with the earlier export"):
        export(encoders["small_stem"], tmp_path / "out")
    assert contents(tmp_path) == before


def test_different_features_are_an_error_that_changes_nothing(encoders, tmp_path):
    export(encoders["vit"], tmp_path / "out")
    before = contents(tmp_path)
    other = make_encoder("test_resnet")
    other.network.act1 = nn.SiLU()  # which the model card does not tell
    with pytest.raises(UserError, match=r"format=timm: the exported network gives other features than the encoder"):
        export(other, tmp_path / "out")
    undefined = make_encoder("test_vit")
    undefined.network.load_state_dict({k: v * torch.nan for k, v in undefined.network.state_dict().items()})
    with pytest.raises(UserError, match="by up to nan"):
        export(undefined, tmp_path / "new")
    assert contents(tmp_path) == before
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    for text in ("first", "second"):
        with write_folder_atomically(tmp_path / "parent" / "out") as folder:
            (folder / "text").write_text(text)
    assert contents(tmp_path) == {Path("parent/out/text"): b"second"}

    def fail():
        with write_folder_atomically(tmp_path / "parent" / "out") as folder:
            (folder / "text").write_text("third")
            raise RuntimeError("half written")

    with pytest.raises(RuntimeError, match="half written"):
        fail()
    assert contents(tmp_path) == {Path("parent/out/text"): b"second"}


def test_the_next_export_removes_what_a_killed_one_left(tmp_path):
    encoder = make_encoder()
    encoder.network.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if not child:
        export(encoder, tmp_path / "a")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [entry.name for entry in tmp_path.iterdir()] == [f"a.{child}.tmp"]
    export(make_encoder(), tmp_path / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


WRONG = [
    ({"format": "jax"}, "format=jax: choose one of timm, onnx, torch"),
    ({"format": "onnx", "preprocess": "both"}, "preprocess=both: choose one of outside, inside"),
    ({"preprocess": "inside"}, "preprocess=inside: the network of format=timm takes normalized pixels"),
    ({"license": "mit\ntags: x"}, "license=mit tags: x: give an identifier"),
    ({"license": ""}, "license=: give an identifier"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message[:20] for _, message in WRONG])
def test_wrong_arguments_are_refused_before_anything_is_written(encoders, tmp_path, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        export(encoders["vit"], tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_encoder_with_the_card_of_another_network_is_refused(encoders, tmp_path):
    wrong = twoview.Encoder(encoders["vit"].network, encoders["small_stem"].card)
    with pytest.raises(UserError, match="encoder: its model card describes another network"):
        export(wrong, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_and_a_large_network_are_refused_before_the_export(encoders, tmp_path, monkeypatch):
    large = twoview.Encoder(nn.Linear(2**15, 2**14, device="meta"), encoders["vit"].card)
    with pytest.raises(UserError, match="format=onnx: the weights take 2.1 GB and an ONNX file at most 2.1 GB"):
        export(large, tmp_path / "out", "onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=re.escape('onnxscript is not installed; pip install "twoview[onnx]"')):
        export(encoders["vit"], tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_name_with_a_tag_and_another_stem_is_not_taken_for_the_published_network(tmp_path):
    network, _ = create_backbone("resnet18.a1_in1k", image_size=SIZE)
    config = timm_config(network, SIZE, None, (0.5,) * 3, (0.5,) * 3)
    assert config["timm_architecture"] == "resnet18"
    assert not timm.is_model(config["architecture"])


@pytest.mark.parametrize(("size", "resized"), [(32, 37), (96, 110), (224, 258), (15, 22), (8, 8)])
def test_the_crop_of_timm_has_the_size_of_twoview(size, resized):
    network, _ = create_backbone("test_resnet", image_size=size)
    config = timm_config(network, size, resized, (0.5,) * 3, (0.5,) * 3)["pretrained_cfg"]
    steps = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config)).transforms
    assert (steps[0].size, tuple(steps[1].size)) == (resized, (size, size))
