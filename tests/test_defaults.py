"""Every knob of conf/ equals the default in Python, except where a file states that it differs on purpose.

A file states this in comment lines, ``# Set on purpose: knob, knob.``, and must then differ in exactly these knobs.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_method
from omegaconf import OmegaConf

from twoview.augment import TwoViews, ViewRecipe
from twoview.data.splits import LoadSettings
from twoview.evaluation.settings import MEASURES, EvaluationSettings
from twoview.training.settings import Recipe
from twoview.variants import LossOptions, check_loss_arguments

CONF = Path(__file__).parents[1] / "conf"
FILES = {
    path.relative_to(CONF).with_suffix("").as_posix(): path
    for path in sorted(CONF.rglob("*.yaml"))
    if path.relative_to(CONF).parts[0] not in ("hydra", "config.yaml")
}
# Files that may differ on purpose, and in which knobs; None for any.
PRESETS = {
    "method/*": None,
    "head/*": None,
    "augment/*": None,
    "experiment/*": None,
    "optimizer/sgd": None,
    "optimizer/lars": None,
    "trainer/short": None,
    "trainer/ddp": None,
    "data/digits": None,
    "eval/*": {"parts", "cache"},
    "logger/*": None,  # defaults of other libraries
}
REQUIRED = inspect.Parameter.empty
# Where a function takes further knobs as keyword arguments: what names them.
FURTHER = {"twoview.augment.TwoViews": ViewRecipe, "twoview.data.folder": LoadSettings}
FURTHER |= dict.fromkeys(("twoview.data.parquet", "twoview.data.webdataset"), LoadSettings)
FURTHER |= dict.fromkeys(("twoview.methods.SimCLR", "twoview.methods.MoCo"), LossOptions)


def read(path):
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def chain(name):
    """The file and those of its group that it is based on, the base first."""
    bases = [entry for entry in read(FILES[name]).get("defaults", []) if isinstance(entry, str)]
    bases = [entry for entry in bases if entry != "_self_" and not entry.startswith("/")]
    group = name.rpartition("/")[0]
    return [file for base in bases for file in chain(f"{group}/{base}")] + [name]


def content(name):
    """The file merged with those that it is based on, as a plain mapping."""
    parts = [{key: value for key, value in read(FILES[file]).items() if key != "defaults"} for file in chain(name)]
    return OmegaConf.to_container(OmegaConf.merge(*parts), resolve=False)


def stated(name):
    """Knobs that one file states that it sets on purpose."""
    lines = re.findall(r"^# Set on purpose: (.*)$", FILES[name].read_text(), flags=re.M)
    assert all(re.fullmatch(r"[\w.]+(, [\w.]+)*\.", line) for line in lines), f"{name}: {lines}"
    return {knob for line in lines for knob in line.rstrip(".").split(", ")}


def defaults_of(target):
    """Default of every knob of a target, by name; ``REQUIRED`` where there is none."""
    function = get_method(target)
    knobs = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    if target == "twoview.evaluation.EvaluationSettings.from_knobs":
        for owner in (EvaluationSettings(), *MEASURES.values()):
            own = {field.name: getattr(owner, field.name) for field in fields(owner)}
            shared = (own.keys() & knobs.keys()) - {"batch_norm"}
            assert all(own[name] == knobs[name] for name in shared), f"{owner}: {shared}"
            knobs |= own
        del knobs["measures"], knobs["batch_norm"]
    further = FURTHER.get(target)
    if further is LossOptions:
        rows = inspect.signature(check_loss_arguments).parameters
        return knobs | {name: rows[name].default for name in LossOptions.__annotations__}
    return knobs | ({field.name: field.default for field in fields(further)} if further else {})


def plain(value):
    """Lists for tuples, and the type of booleans and numbers, so that 1 is not true."""
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return (type(value).__name__ if isinstance(value, bool) else "", value)


def is_reference(value):
    """Whether a value comes from elsewhere: an interpolation, or one that users must give."""
    return isinstance(value, str) and ("${" in value or value == "???")


def differences(node, prefix="", known=None):
    """Dotted names of knobs of a node, which has a ``_target_``, whose value is not the default in Python."""
    target = node["_target_"]
    defaults = defaults_of(target) | (known or {})
    found = set()
    for knob, value in node.items():
        if knob in ("_target_", "_partial_"):
            continue
        assert knob in defaults, f"{prefix}{knob}: {target} has no such argument"
        default = defaults[knob]
        if isinstance(value, dict) and "_target_" in value:
            same = isinstance(default, partial) and default.func is get_method(value["_target_"])
            if isinstance(default, partial) and not same:
                found.add(prefix + knob)
            found |= differences(value, f"{prefix}{knob}.", default.keywords if same else {})
        elif not is_reference(value) and plain(value) != plain(default):
            found.add(prefix + knob)
    return found


def nodes(value, prefix=""):
    """The outermost mappings with a ``_target_``, and their dotted prefixes."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield prefix, value
        else:
            for key, inner in value.items():
                yield from nodes(inner, f"{prefix}{key}.")


def flat(value, prefix=""):
    """Dotted names of all knobs of a file."""
    names = set()
    for key, inner in value.items():
        names |= {prefix + key} | (flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else set())
    return names


def resolved(name):
    """Content of a file, in which references to top-level knobs of the same file are replaced by their values."""
    values = content(name)
    text = re.compile(r"\$\{([\w.]+)\}")

    def replaced(value):
        if isinstance(value, dict):
            return {key: replaced(inner) for key, inner in value.items()}
        match = text.fullmatch(value) if isinstance(value, str) else None
        found = OmegaConf.select(OmegaConf.create(values), match[1], default=value) if match else value
        return value if OmegaConf.is_config(found) else found

    return replaced(values)


@pytest.fixture(scope="module")
def composed():
    """Composes the configuration of a command line; references are not replaced."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: OmegaConf.to_container(hydra.compose("config", list(overrides)), resolve=False)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("experiment/")])
def test_knobs_equal_the_defaults_in_python(name):
    found = set()
    for prefix, node in nodes(resolved(name)):
        found |= differences(node, prefix)
    expected = set()
    for file in chain(name):
        own = read(FILES[file])
        own.pop("defaults", None)
        assert stated(file) <= flat(own), f"{file}: states a knob that it does not set"
        expected = expected - flat(own) | stated(file)
    assert found == expected


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("experiment/")])
def test_knobs_of_an_experiment_equal_the_defaults_in_python_of_what_it_changes(name, composed):
    own = read(FILES[name])
    own.pop("defaults", None)
    whole = composed(name.replace("/", "="))
    found = set()
    for group, node in own.items():
        changed = {"_target_": whole[group]["_target_"], **node} if isinstance(node, dict) else {}
        assert changed, f"{group}: no group of knobs"
        found |= differences(changed, f"{group}.")
    assert found == stated(name)


def test_only_presets_differ():
    for name in FILES:
        allowed = [knobs for pattern, knobs in PRESETS.items() if fnmatch(name, pattern)]
        assert not stated(name) or (allowed and (allowed[0] is None or stated(name) <= allowed[0])), name


def test_default_choices_are_the_defaults_of_a_recipe(composed):
    cfg = composed()
    parts = {**{name: name for name in ("method", "backbone", "head", "augment", "optimizer")}, "schedule": "scheduler"}
    for field in fields(Recipe):
        default = field.default
        function = type(default) if is_dataclass(default) else default
        assert get_method(cfg[parts[field.name]]["_target_"]) is function, field.name


def test_the_comparison_finds_differences():
    head = {"_target_": "twoview.heads.projection_head", "layers": 3, "hidden_dim": 512, "last_bn": 1}
    assert differences(head) == {"layers", "last_bn"}
    optimizer = {"_target_": "twoview.optim.OptimizerSettings", "lr": 0.1}
    for factory, found in (
        ({"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95]}, set()),
        ({"_target_": "torch.optim.AdamW", "betas": [0.9, 0.999], "eps": 1e-8}, {"factory.betas"}),
        ({"_target_": "torch.optim.SGD", "momentum": 0.9}, {"factory", "factory.momentum"}),
    ):
        assert differences(optimizer | {"factory": factory}) == {"lr"} | found
    views = {"_target_": "twoview.augment.TwoViews", "blur_p": 0.5, "flip_p": 0.0, "min_crop_area": 0.0}
    assert differences(views) == {"flip_p"}
    assert TwoViews is get_method(views["_target_"])
    evaluation = {"_target_": "twoview.evaluation.EvaluationSettings.from_knobs", "k": [1], "draws": 5, "holdout": 0.2}
    assert differences(evaluation) == {"k"}
    with pytest.raises(AssertionError, match="no such argument"):
        differences({"_target_": "twoview.heads.projection_head", "layer": 3})
