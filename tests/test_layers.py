"""The layers of the package: which file may import what. A new file in a layer needs no line here."""

import ast
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ssl" / "twoview"
STANDARD = set(sys.stdlib_module_names)

# From the top of the table in the README: a layer imports only the layers before it, and itself.
LAYERS = {
    "arithmetic": {"losses", "streaming", "variants", "schedules", "metrics"},
    "parts": {
        *("backbones", "heads", "momentum", "negatives", "distributed", "optim", "augment", "data"),
        *("files", "torch_files", "devices", "allocator", "folding", "recomputation"),
        "timm_folder",
    },
    "encoder": {"encoder", "loading"},
    "methods": {"methods"},
    "training": {"training"},
    "evaluation": {"evaluation"},
    "reporting": {"reporting"},
    "tools": {"tools", "serving"},
    "API": {"runs"},
    "edge": {"cli", "__main__"},
}
ORDER = list(LAYERS)
LAYER_OF = {unit: layer for layer, units in LAYERS.items() for unit in units}
# The package itself defines lazy names and the version; errors may be raised anywhere.
EVERYWHERE = {"errors", "__version__"}

LIBRARIES = {
    "losses": {"torch"},
    "streaming": {"torch"},
    "variants": set(),
    "schedules": set(),
    "metrics": {"torch"},
    "backbones": {"torch", "timm", "safetensors"},
    "optim": {"torch", "timm"},
    "augment": {"torch", "kornia", "numpy"},
    "data": {"torch", "torchvision", "sklearn", "PIL", "numpy", "tifffile", "pyarrow"},
    "files": set(),
    "torch_files": {"torch", "safetensors"},
    "timm_folder": {"torch", "timm"},
    "folding": {"torch", "timm"},
    "encoder": {"torch", "safetensors", "PIL"},
    "training": {"torch", "lightning", "rich"},
    "evaluation": {"torch", "numpy", "sklearn", "scipy", "torchmetrics", "safetensors"},
    "reporting": {"torch", "numpy", "sklearn", "PIL", "rich", "safetensors", "matplotlib", "jinja2", "umap"},
    "tools": {
        *("torch", "numpy", "PIL", "sklearn", "umap"),
        *("onnx", "onnxruntime", "faiss", "pyarrow", "safetensors"),
    },
    "serving": {"torch", "PIL", "fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart"},
    "cli": {"hydra", "omegaconf", "rich", "torch"},
    "__main__": set(),
    "__init__": set(),
    "errors": set(),
}
DEFAULT_LIBRARIES = {"torch"}


@cache
def parsed(text):
    """The syntax tree of a file, which is made once although the package is copied for every planted violation."""
    return ast.parse(text)


@cache
def imports(tree):
    """Dotted names of everything that is imported, at the top of a file, inside functions, or by ``import_module``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


@cache
def dotted_attributes(tree):
    """Dotted names of attributes that are used, such as ``torch.nn.Linear``."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def violations(package):
    """One line for each import or use that a layer does not allow."""
    found = []
    for file in sorted(package.rglob("*.py")):
        where = file.relative_to(package)
        unit = where.parts[0].removesuffix(".py")
        tree = parsed(file.read_text())
        if unit not in LAYER_OF and unit not in EVERYWHERE | {"__init__"}:
            found.append(f"{where}: is in no layer")
            continue
        for name in imports(tree):
            if message := _forbidden(unit, name):
                found.append(f"{where}: {message}")
        if LAYER_OF.get(unit) == "arithmetic":
            names = imports(tree) | dotted_attributes(tree) - {"torch.nn"}  # a part of torch.nn.functional.relu
            found += [f"{where}: arithmetic uses {name}" for name in names if _is_module_or_distributed(name)]
            found += [f"{where}: arithmetic uses self" for node in ast.walk(tree) if getattr(node, "arg", "") == "self"]
        if unit == "training" and file.stem != "lightning_internals":
            found += [f"{where}: uses Lightning's {name}" for name in dotted_attributes(tree) if _is_private(name)]
    return found


def _forbidden(unit, name):
    top, *rest = name.split(".")
    if not top:
        return f"relative import {name}"
    if top != "twoview":
        allowed = LIBRARIES.get(unit, DEFAULT_LIBRARIES) | STANDARD
        return "" if top in allowed else f"{unit} may not import {name}"
    other = rest[0] if rest else ""
    if other in EVERYWHERE or unit == other or unit == "__init__":
        return ""
    if unit in EVERYWHERE or other not in LAYER_OF:
        return f"{unit} may not import {name}"
    above = ORDER.index(LAYER_OF[other]) <= ORDER.index(LAYER_OF[unit])
    return "" if above else f"{unit} may not import {name}, which is in a later layer"


def _is_module_or_distributed(name):
    is_module = name.startswith("torch.nn") and not name.startswith("torch.nn.functional")
    return is_module or name.startswith("torch.distributed")


def _is_private(name):
    owner, _, attribute = name.rpartition(".")
    private = attribute.startswith("_") and not attribute.startswith("__") and owner not in ("self", "cls", "os")
    return (private and "torch" not in owner) or "fit_loop" in name.split(".")


def test_every_file_imports_only_what_its_layer_allows():
    assert violations(PACKAGE) == []


PLANTS = [
    ("losses.py", "from torch import nn\n\nlinear = nn.Linear(1, 1)"),
    ("losses.py", "def f():\n    return torch.nn.Linear(1, 1)"),
    ("metrics.py", "import torch.distributed as dist"),
    ("metrics.py", "def f():\n    return torch.distributed.get_rank()"),
    ("schedules.py", "import torch"),
    ("schedules.py", "def f():\n    from twoview.heads import projection_head"),
    ("losses.py", "from twoview.distributed import gather"),
    ("heads.py", "import timm"),
    ("heads.py", "from twoview.methods import SimCLR"),
    ("momentum.py", "def f():\n    import lightning"),
    ("backbones.py", "import kornia"),
    ("files.py", "from twoview.encoder import load"),
    ("augment/recipe.py", "from lightning.pytorch import Trainer"),
    ("data/images.py", "def f():\n    import lightning as L"),
    ("data/folder.py", "from twoview.training import RunSettings"),
    ("encoder.py", "from twoview.methods import SimCLR"),
    ("encoder.py", "import lightning"),
    ("methods/simclr.py", "from twoview.training.module import Pretraining"),
    ("methods/base.py", "import numpy"),
    ("training/module.py", "def f():\n    from twoview.evaluation import evaluate"),
    ("training/callbacks/signals.py", "import hydra"),
    ("training/trainer.py", "def f(trainer):\n    return trainer._logger_connector"),
    ("training/trainer.py", "def f(trainer):\n    return trainer.fit_loop.epoch_loop"),
    ("evaluation/knn.py", "import lightning"),
    ("evaluation/knn.py", "from twoview.reporting import show"),
    ("evaluation/linear.py", "from twoview.runs import evaluate"),
    ("reporting/tables.py", "def f():\n    from twoview.cli import main"),
    ("reporting/pages.py", "from omegaconf import OmegaConf"),
    ("runs.py", "import hydra"),
    ("runs.py", "import torchvision"),
    ("runs.py", "from importlib import import_module\n\nmodule = import_module('twoview.cli')"),
    ("errors.py", "from twoview.files import write_atomically"),
    ("cli/main.py", "import lightning"),
    ("methods/moco.py", "from . import simclr"),
    ("unplaced.py", "import torch"),
]


@pytest.mark.parametrize(("file", "code"), PLANTS, ids=[f"{file}-{i}" for i, (file, _) in enumerate(PLANTS)])
def test_a_planted_violation_is_found(file, code, tmp_path):
    package = tmp_path / "twoview"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    planted = package / file
    planted.write_text((planted.read_text() if planted.exists() else "") + f"\n\n{code}\n")
    found = violations(package)
    assert found
    assert all(line.startswith(f"{file}:") for line in found)


def test_no_file_is_named_like_the_standard_library():
    assert not {f.stem for f in PACKAGE.rglob("*.py") if f.stem != "__init__"} & STANDARD


def test_the_ssl_folder_is_not_a_package():
    assert not list((ROOT / "ssl").glob("*.py")), "it would shadow Python's own ssl module"


def test_inheritance_is_one_deep():
    trees = [ast.parse(f.read_text()) for f in PACKAGE.rglob("*.py")]
    classes = {n.name: n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    for node in classes.values():
        for base in node.bases:
            ours = classes.get(base.id if isinstance(base, ast.Name) else "")
            if ours is not None:
                assert not any(isinstance(b, ast.Name) and b.id in classes for b in ours.bases), node.name


@pytest.mark.parametrize("folder", ["ssl", "tests", "benchmarks"])
def test_no_file_is_longer_than_350_lines(folder):
    long = {f.name: n for f in (ROOT / folder).rglob("*.py") if (n := len(f.read_text().splitlines())) > 350}
    assert not long
