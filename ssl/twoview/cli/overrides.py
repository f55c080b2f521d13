"""Quoting of command-line overrides, and checks with suggestions before torch is imported."""

import contextlib
import difflib
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoview.errors import UserError, require

_PACKAGE = Path(__file__).resolve().parents[1]
# The folder conf/ is inside the package in an installed wheel, and at the repository root in a clone.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parents[1] / "conf"

# Mappings that accept any key, also where they are not empty.
_ANY_KEYS = ("augment.view_b", "backbone.options")

# Knobs that have a default value and accept null.
_NULLABLE = ("trainer.max_epochs", "trainer.max_time", "eval.cache")

# Nodes whose keys may be added and removed: settings of other libraries, of which conf/ lists only some.
_OPEN = re.compile(r"(hydra|logger|optimizer\.factory)\b.")

# Plugins of Hydra (launchers and sweepers), and the optional dependencies that install them.
_PLUGINS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit", "optuna": "optuna"}

# Type of a default value, and its description in the error message for an override of another type.
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}


def quoted(argument: str, sweep: bool = False) -> str:
    """Quote the value of ``key=value`` where Hydra's grammar cannot parse it, or would parse a path as something else.

    Args:
        argument: argument of the command line.
        sweep: whether the command is a sweep, in which a comma separates values.

    >>> quoted("data.root=/x/München"), quoted("data.root=/x/a, b"), quoted("seed=1")
    ("data.root='/x/München'", "data.root='/x/a, b'", 'seed=1')
    """
    match = re.fullmatch(r"([~+]{0,2}[\w./@:-]+)=(.*)", argument, re.DOTALL)
    if match is None:
        return argument
    with contextlib.suppress(HydraException):
        override = OverridesParser.create().parse_override(argument)
        changed = override.is_sweep_override() or (isinstance(override.value(), str) and override.value() != match[2])
        is_path = match[2].startswith(("/", "./", "../", "~/")) or os.path.exists(match[2])
        if sweep or not changed or not is_path:
            return argument
    # In quotes, Hydra reads backslashes as they are, except those before a quote.
    value = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), match[2])
    return f"{match[1]}='{value}'"


def typed(override: str) -> str:
    """Return an override as it can be typed in a shell, without quotes that :func:`quoted` adds.

    >>> print(typed("data.root='/x/München'"), typed("data.root='/x/a'"), typed("seed=1"))
    'data.root=/x/München' data.root=/x/a seed=1
    """
    value, parser = OverridesParser.create().parse_override(override).value(), OverridesParser.create()
    plain = f"{override.partition('=')[0]}={value}"
    same = isinstance(value, str) and parser.parse_override(quoted(plain)).value() == value
    return shlex.quote(plain if same else override)


def value_of(key: str, overrides: Iterable[str]) -> str | None:
    """Return the value of a key in overrides such as ``key=value``, without quotes; None if the key is missing."""
    return next((o.partition("=")[2].strip("'\"") for o in overrides if o.startswith(f"{key}=")), None)


def without(cfg: Any, *keys: str) -> DictConfig:
    """Return a configuration without some of its top-level keys."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in keys])


def check_overrides(overrides: list[str], sweep: bool = False) -> list[str]:
    """Check that the configuration accepts the overrides: keys, choices of groups, and types of values.

    Args:
        overrides: overrides of the command line, quoted by :func:`quoted`.
        sweep: whether the command is a sweep, in which ``a=1,2`` means two runs.

    Returns:
        The overrides for Hydra. A key inside an empty mapping, such as ``augment.view_b.blur_p``, gets the prefix
        ``++``.

    Raises:
        UserError: if an override is not accepted; the message suggests the nearest valid key or value.
    """
    parser = OverridesParser.create()
    parsed: list[Override] = []
    others: list[Override] = []  # the second and later values of a sweep
    first: dict[str, str] = {}
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            raise UserError(f"{text}: write KEY=VALUE, such as method.temperature=0.2") from None
        before = first.setdefault(override.key_or_group, text)
        # Lightning repeats hydra.run.dir in the command line of each rank.
        once = text == before or text.startswith("hydra.")
        require(once, f"{before} {text}: {override.key_or_group} is given twice; leave one of them out")
        if override.is_sweep_override():
            single = shlex.quote(f'{override.key_or_group}="{text.partition("=")[2]}"')
            require(sweep, f"{text}: several values are a sweep; add -m, or write {single} for a single value")
            if not override.is_discrete_sweep():
                continue
            key = override.get_key_element()
            override, *more = (parser.parse_override(f"{key}={value}") for value in override.sweep_string_iterator())
            others += more
        parsed.append(override)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        _check_choices([*parsed, *others])
        knobs = _knobs(_compose_groups([o for o in parsed if _choices(o.key_or_group)]))
        for override in [*parsed, *others]:
            _check_value(override, knobs)
        try:
            cfg = hydra.compose("config", [_free(str(o.input_line), knobs) for o in parsed])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(str(error).splitlines()[0]) from None
        if missing := [key for key, value in _knobs(cfg).items() if value == "???"]:
            raise UserError(f"{missing[0]} is missing: give {missing[0]}=VALUE")
        _check_effects(first, cfg)
    return [_free(text, knobs) for text in overrides]


def _check_choices(overrides: list[Override]) -> None:
    for override in overrides:
        group, choice, choices = override.key_or_group, override.value(), _choices(override.key_or_group)
        removable = not override.is_delete() or _OPEN.match(group)
        require(removable, f"~{group}: only a logger can be removed, such as ~logger.tensorboard; leave it out")
        if choices and choice not in choices and not override.is_delete():
            choice = "null" if choice is None else choice
            extra = _PLUGINS.get(str(choice)) if group.startswith("hydra/") else None
            require(not extra, f'{group}={choice}: this plugin is not installed; pip install "twoview[{extra}]"')
            advice = f"{_nearest(str(choice), choices)}choose one of {', '.join(choices)}"
            raise UserError(f"{group}={choice}: there is no {group} {str(choice)!r}; {advice}")


def _compose_groups(groups: list[Override]) -> DictConfig:
    try:
        return hydra.compose("config", [str(o.input_line) for o in groups])
    except HydraException as error:
        task = next((o.value() for o in groups if o.key_or_group == "task"), "pretrain")
        for group, text in ((o.key_or_group, o.input_line) for o in groups):
            unused = f"Could not override '{group}'" in str(error)
            require(not unused, f"{text}: task={task} does not use {group}; leave it out")
        raise UserError(str(error).splitlines()[0]) from None


def _free(text: str, knobs: Mapping[str, Any]) -> str:
    """Add the prefix ``++`` if the key is inside a mapping of any keys; without it, Hydra rejects new keys."""
    key = text.partition("=")[0]
    parents = [key.rsplit(".", i)[0] for i in range(key.count(".") + 1)]
    free = any(knobs.get(parent) == {} or parent in _ANY_KEYS for parent in parents)
    return f"++{text}" if free else text


def _check_value(override: Override, knobs: Mapping[str, Any]) -> None:
    key, value = override.key_or_group, override.value()
    added = override.is_add() or override.is_force_add()
    if override.is_delete() or key.startswith("hydra") or _choices(key) or (added and _OPEN.match(key)):
        return
    if key not in knobs and _free(key, knobs) == key:
        near = _nearest(key, [*knobs, *GlobalHydra.instance().config_loader().list_groups("")])
        raise UserError(f"{key}={value}: this task has no knob {key!r}; {near}--cfg job shows all knobs")
    before = knobs.get(key)
    nullable = before is None or key in _NULLABLE or str(before).startswith("${")
    require(value is not None or nullable, f"{key}=null: this knob needs a value, such as {before}")
    wanted = next((words for kind, words in _KINDS.items() if isinstance(before, kind)), "")
    example = f"[{','.join(map(str, before or [value]))}]" if isinstance(before, list) else before
    require(value is None or _fits(before, value), f"{key}={value}: give {wanted}, such as {example}")


def _check_effects(given: Iterable[str], cfg: DictConfig) -> None:
    """Refuse knobs that were given and that this configuration replaces."""
    replaced = "optimizer.lr" in given and "finetune" in cfg
    lr = OmegaConf.select(cfg, "optimizer.lr")
    require(
        not replaced, f"optimizer.lr={lr}: task=finetune chooses one of finetune.learning_rates; give these instead"
    )


def _fits(before: Any, value: Any) -> bool:
    if isinstance(before, list):
        return isinstance(value, list) and all(_fits(before[0], v) for v in value if before)
    if isinstance(before, int | float) and not isinstance(before, bool):
        return isinstance(value, int | type(before)) and not isinstance(value, bool)
    return isinstance(value, type(before)) or not isinstance(before, bool | dict)


def _choices(group: str) -> list[str]:
    # No group has a dot in its name, and Hydra lists all folders of configurations for each question.
    return [] if "." in group else list(GlobalHydra.instance().config_loader().get_group_options(group))


def _knobs(cfg: DictConfig) -> dict[str, Any]:
    """Return all knobs and mappings by dotted name, without resolving interpolations."""

    def flat(node: Any, prefix: str) -> dict[str, Any]:
        knobs = {}
        for key, value in node.items():
            knobs[prefix + key] = value
            if isinstance(value, dict):
                knobs |= flat(value, f"{prefix}{key}.")
        return knobs

    # The node of the task only refers to the other groups.
    return flat(OmegaConf.to_container(without(cfg, "task")), "")


def _nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
