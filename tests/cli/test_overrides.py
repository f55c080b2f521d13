import re
import shlex
import shutil

import hydra
import pytest
import torch
from commands import ROOT, train
from hostile_runs import run
from hydra.core.global_hydra import GlobalHydra

from twoview.cli.overrides import CONF, check_overrides, quoted, typed
from twoview.errors import UserError

MISTAKES = {
    "mehtod=simclr": "did you mean 'method'?",
    "method=simclrr": "did you mean 'simclr'?",
    "method.temprature=0.1": "did you mean 'method.temperature'?",
    "method.temperature=0": "method.temperature=0: must be above 0",
    "optimizer.lr=-1": "optimizer.lr=-1: the learning rate must be above 0",
    "optimizer.lr=fast": "optimizer.lr=fast: give a number",
    "data.batch_size=100000": "digits has 1347 images",
    "backbone.name=resnet19": "did you mean resnet1",
    "data=cifar10 data.root=/x/München": "data.root=/x/München: cifar10 is not there and could not be downloaded",
    "task=linear_probe checkpoint=README.md": "checkpoint=README.md: cannot be read as a checkpoint",
    "task=linear_probe method=simclr checkpoint=RUN": "task=linear_probe does not use method",
    "task=linear_probe": "checkpoint is missing",
    "method.temperature=0.1,0.5": "add -m",
    "temperature": "write KEY=VALUE",
    "select_by=test/linear_top1": "choose one of val/linear_top1",
    "seed=-1": "seed=-1: give a whole number from 0",
    "eval.k=[1.5]": "eval.k=[1.5]: give a list",
    "optimizer.lr=null": "optimizer.lr=null: this knob needs a value",
    "checkpoint=0 task=knn": "checkpoint=0: there is no checkpoint",
    "data=folder data.root=2024": "data.root=2024: there is no such folder",
    "data=fake data.classes=1": "data.classes=1: give a whole number, at least 2",
    "optimizer=sgd optimizer.factory.momentum=-1": "optimizer.factory: Invalid momentum value",
    "logger=wandb": "pip install",
    "-m data=digits,digitz": "did you mean 'digits'?",
    "-m optimizer.lr=0.1,fast": "optimizer.lr=fast: give a number",
    "method=moco method.momentum=2": "method.momentum=2: must lie between 0 and 1",
    "method.bn=shuffle": "method.bn=shuffle: choose one of plain, split, sync",
    "task=compare": "runs is missing",
    "task=compare runs=[runs/a,runs/b]": "runs/a: no report.json",
    "task=evaluate checkpoint=timm:resnet19": "did you mean resnet1",
    "task=evaluate checkpoint=x eval.parts=[linaer]": "eval.parts=linaer: choose one of linear",
    "task=finetune checkpoint=x finetune.label_share=2": "finetune.label_share=2: give",
    "task=embed checkpoint=x to=y columns=thumbnail": "columns=thumbnail: give a list, such as [thumbnail]",
    "task=duplicates kinds=mirrored": "kinds=mirrored: give a list, such as [re-encoded,resized,mirrored,cropped]",
    "trainer.max_time=soon trainer.max_epochs=null": "trainer.max_time=soon",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_one_sentence(mistake, tmp_path):
    (tmp_path / "work").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path / "work")
    found = run(tmp_path / "work", *mistake.split(), limit=60)
    assert found.refused(MISTAKES[mistake]), found
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    "value",
    [
        *("/x/München", "a(1)", "it's", "a b", "C:\\pictures\\", "{x", "[y", 'say "hi"', "x=y", "$HOME", "back\\'s"),
        *(
            "/x/a, b",
            "./a,b",
            "../a, (b), c ",
            "~/x\\,y",
            "/x/{a},[b]",
            "/x/Blüten, rot  (2024)",
            "/a'b\\\\c,d",
            "/1,2",
        ),
    ],
)
def test_plain_paths_need_no_quotes(value):
    override = quoted(f"data.root={value}")
    (typed_again,) = shlex.split(typed(override))
    for text in (override, quoted(typed_again)):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            assert hydra.compose("config", ["data=cifar10", text]).data.root == value


def test_a_comma_in_the_name_of_a_file_is_no_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b").mkdir()
    assert quoted("data.root=a, b") == "data.root='a, b'"
    assert quoted("data.root=a, c") == "data.root=a, c"
    for text in ("data.root=a, b", "data.root=/a,/b"):
        assert quoted(text, sweep=True) == text


def test_a_list_of_values_names_the_quotes_for_a_single_one():
    with pytest.raises(UserError) as refused:
        check_overrides(["data=folder", quoted("data.root=a, c")])
    (word,) = shlex.split(re.search("or write (.*) for a single value", str(refused.value))[1])
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        assert hydra.compose("config", ["data=folder", quoted(word)]).data.root == "a, c"


def test_valid_overrides_are_left_alone():
    for text in ("method=simclr", "augment.crop_scale=[0.2,1]", "data.root='a b'", "+x={a:1}", "~logger"):
        assert quoted(text) == text


def choices():
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = [g for g in loader.list_groups("") if g not in ("hydra", "task")]
        return [(g, c) for g in groups for c in loader.get_group_options(g)]


@pytest.mark.parametrize(("group", "choice"), choices())
def test_every_choice_composes_and_instantiates(group, choice):
    root = ["data.root=x"] if choice in ("folder", "parquet", "webdataset", "cifar10_cpu") else []
    check_overrides([f"{group}={choice}", *root])
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [f"{group}={choice}", *root])
        if group in ("logger", "experiment"):  # loggers are extras, and experiments have no node of their own
            return
        node = hydra.utils.instantiate(cfg[group], _convert_="all")
    match group:
        case "head":
            assert node(20)(torch.zeros(4, 20)).ndim == 2
        case "augment":
            view, _ = node(image_size=16, channels=3, mean=[0.5] * 3, std=[0.2] * 3)(
                torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
            )
            assert view.shape == (2, 3, 16, 16)
        case "method":
            assert node(torch.nn.Identity(), torch.nn.Linear(2, 2)).temperature > 0
        case "optimizer":
            assert node.build(torch.nn.Linear(2, 2), 256).param_groups
        case "scheduler":
            assert 0 <= node(1.0, 10.0) <= 1
        case "data":
            assert callable(node)


@pytest.mark.parametrize("task", sorted(p.stem for p in (CONF / "task").glob("*.yaml")))
def test_every_task_composes(task):
    needed = {"compare": ["runs=[a,b]"], "index": ["embeddings=a", "to=b"], "search": ["index=a", "query=b"]}
    needed |= {name: ["checkpoint=x", "to=b"] for name in ("embed", "export")}
    needed |= {name: [] for name in ("pretrain", "preview", "duplicates")}
    needed |= {"drift": ["reference=a", "current=b"], "serve": ["index=a"]}
    check_overrides([f"task={task}", *needed.get(task, ["checkpoint=x"])])


def readme_commands():
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        for line in block.splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:2] == ["python", "train.py"] or words[:1] == ["twoview"]:
                    yield words[2:] if words[0] == "python" else words[1:]


@pytest.mark.parametrize("words", list(readme_commands()), ids=" ".join)
def test_every_readme_command_composes(words):
    flags = [w for w in words if w.startswith("-")]
    check_overrides([quoted(w) for w in words if not w.startswith("-")], sweep="-m" in flags)


def test_the_readme_starts_with_a_command():
    assert any("python train.py" in line for line in (ROOT / "README.md").read_text().splitlines()[:25])


def test_help_lists_everything():
    text = train("--help").stdout
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for group, title in (("task", "Tasks"), ("method", "Methods"), ("data", "Data")):
            line = next(x for x in text.splitlines() if x.strip().startswith(f"{title}:"))
            for choice in loader.get_group_options(group):
                assert choice in line, f"{choice} is missing in the line of {title}"
    assert text.count("python train.py ") >= 5


def test_unknown_kinds_of_mistakes_are_sentences_too():
    with pytest.raises(UserError):
        check_overrides(["augment.view_b=3"])


def test_empty_mappings_take_any_key():
    texts = check_overrides(["augment.view_b={blur_p: 0.1}", "backbone.options.drop_path_rate=0.1", "seed=1"])
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", texts)
    assert (cfg.augment.view_b, cfg.backbone.options, cfg.seed) == ({"blur_p": 0.1}, {"drop_path_rate": 0.1}, 1)
