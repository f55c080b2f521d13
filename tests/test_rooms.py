"""The architecture is checked: which room may import what, and that the source root is no package."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ssl" / "twoview"

ARITHMETIC = {"losses", "schedules", "metrics"}
PARTS = {"backbones", "heads", "augment", "momentum", "negatives", "distributed", "optim", "data"}
METHODS = {"methods"}
RUNS = {
    "pretrain",
    "evaluate",
    "finetune",
    "interrupts",
    "monitors",
    "checkpoints",
    "runs",
    "judging",
    "records",
    "sweeps",
    "report",
}
EDGE = {"cli", "__main__"}
ANYWHERE = {"errors", "__init__"}
STANDARD = set(sys.stdlib_module_names)

# Third-party modules and rooms that each room may import; errors and the package itself may be named anywhere.
ALLOWED = {
    **dict.fromkeys(ARITHMETIC, ({"torch"}, ARITHMETIC)),
    "backbones": ({"torch", "timm", "safetensors"}, ARITHMETIC | PARTS),
    "heads": ({"torch"}, ARITHMETIC | PARTS),
    "augment": ({"torch", "kornia", "numpy"}, ARITHMETIC | PARTS),
    "optim": ({"torch", "timm"}, ARITHMETIC | PARTS),
    "momentum": ({"torch"}, ARITHMETIC | PARTS),
    "negatives": ({"torch"}, ARITHMETIC | PARTS),
    "distributed": ({"torch"}, ARITHMETIC | PARTS),
    "data": (
        {"torch", "torchvision", "lightning", "sklearn", "PIL", "numpy", "tifffile", "pyarrow"},
        ARITHMETIC | PARTS,
    ),
    "methods": ({"torch"}, ARITHMETIC | PARTS | METHODS),
    **dict.fromkeys(
        RUNS,
        (
            {"torch", "lightning", "sklearn", "scipy", "torchmetrics", "numpy", "PIL", "rich", "safetensors"},
            ARITHMETIC | PARTS | METHODS | RUNS,
        ),
    ),
    "report": (
        {"torch", "numpy", "sklearn", "PIL", "rich", "safetensors", "matplotlib", "jinja2", "umap"},
        ARITHMETIC | PARTS | RUNS,
    ),
    "cli": ({"hydra", "omegaconf", "torch"}, {"runs", "sweeps", "report"}),
    "__main__": (set(), {"cli"}),
    "errors": (set(), set()),
    "__init__": (set(), {"checkpoints", "momentum", "negatives"}),
}
# How pictures come out of files; the way of a batch begins behind them, at data/images.py.
FORMATS = {"decode", "folder", "named", "pictures", "shards"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file):
    """Dotted names of everything a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(file):
    libraries, rooms = ALLOWED[room(file)]
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "twoview":
            assert parts[1] in rooms | ANYWHERE | {"__version__"}, f"{file.name} may not import {name}"
        else:
            assert parts[0] in libraries | STANDARD, f"{file.name} may not import {name}"


def test_arithmetic_has_no_modules_and_no_classes():
    for name in ARITHMETIC:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
        assert not any(".nn" in i and "functional" not in i for i in imports(PACKAGE / f"{name}.py"))


def test_no_file_is_named_like_the_standard_library():
    assert not {f.stem for f in FILES if f.stem != "__init__"} & STANDARD


def test_the_ssl_folder_is_not_a_package():
    assert not list((ROOT / "ssl").glob("*.py")), "it would shadow Python's own ssl module"


def test_inheritance_is_one_deep():
    classes = {n.name: n for f in FILES for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.ClassDef)}
    for node in classes.values():
        for base in node.bases:
            ours = classes.get(base.id if isinstance(base, ast.Name) else "")
            if ours is not None:
                assert not any(isinstance(b, ast.Name) and b.id in classes for b in ours.bases), node.name


def lines_of_code(files):
    """Lines that hold code: no blank lines, no comments, no docstrings."""
    total = 0
    for file in files:
        tree = ast.parse(file.read_text())
        docs = {
            line
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            for line in range(node.lineno, node.end_lineno + 1)
        }
        nothing = {
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        }
        tokens = tokenize.generate_tokens(io.StringIO(file.read_text()).readline)
        total += len({t.start[0] for t in tokens if t.type not in nothing} - docs)
    return total


def test_the_code_stays_within_its_budget():
    core = [f for f in FILES if room(f) in ARITHMETIC | PARTS | METHODS | {"pretrain", "cli"}]
    formats = [f for f in core if f.parent.name == "data" and f.stem in FORMATS]
    assert lines_of_code([f for f in core if f not in formats]) <= 1800
    assert lines_of_code(formats) <= 800
    assert lines_of_code([f for f in FILES if room(f) == "evaluate"]) <= 800
