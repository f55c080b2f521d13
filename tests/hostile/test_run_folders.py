"""Run folders and checkpoints from anyone: nothing in them is executed, and a refused start changes nothing."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hostile_runs import SHORT, run
from omegaconf import OmegaConf

from twoview.cli.stored import dump_overrides, read_overrides

TINY = (*SHORT, "data=fake", "data.images=64", "data.batch_size=32", "eval.parts=[knn]", "trainer.check_every=0")
ATTACK = "attack-was-executed"


class Payload:
    """Creates a file when it is unpickled without ``weights_only``."""

    def __reduce__(self):
        return (open, (ATTACK, "w"))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A stopped run: its folder holds a last and a previous checkpoint, and no report."""
    folder = tmp_path_factory.mktemp("template")
    for steps in (2, 4):
        resume = ["resume=runs/r"] if steps == 4 else ["hydra.run.dir=runs/r"]
        knobs = [knob for knob in TINY if not knob.startswith("trainer.max_steps=")]
        found = run(folder / "work", *knobs, *resume, f"trainer.max_steps={steps}", limit=60)
        assert found.code == 0, found
    (folder / "work/runs/r/report.json").unlink()
    return folder / "work/runs/r"


@pytest.fixture
def work(tmp_path, template):
    shutil.copytree(template, tmp_path / "work/runs/r")
    return tmp_path / "work"


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.log"}


STORED = [
    "+logger.e._target_=torch.load",
    "logger.e._target_=torch.load",
    "++logger.e={_target_:torch.load,f:x,weights_only:false}",
    "optimizer.factory={_target_:os.system,_args_:[touch attack]}",
    "optimizer.factory._target_=os.system",
    "augment.view_b={_target_:os.system}",
    "augment.view_b={'_tar\\get_':os.system}",
    "hydra.job.env_set.PATH=/tmp",
    "hydra.output_subdir=../../../outside",
    "hydra.run.dir=../outside",
    "hydra.job_logging.handlers.file.filename=outside.log",
    "hydra/launcher=joblib",
    "method@hydra.launcher=simclr",
    "~optimizer",
    "~trainer.clip",
    "data.name=${oc.env:HOME}",
    "seed=${oc.decode:1}",
    "seed=${seed",
    "seed=1,2",
    "task=evaluate",
    "task._target_=os.system",
    "task.run._target_=os.system",
    "method=../../evil",
    "no equals sign",
    "seed=1\n- +x=1",
    "x" * 200,
]


@pytest.mark.parametrize("line", STORED, ids=range(len(STORED)))
def test_only_knobs_and_choices_are_taken_from_a_folder(work, line):
    stored = work / "runs/r/.hydra/overrides.yaml"
    # Resolvers of the test's own process must not run either: the text is written as it stands.
    texts = [*OmegaConf.to_container(OmegaConf.load(stored)), line]
    stored.write_text("".join(f"- {text if chr(10) in text else repr(text)}\n" for text in texts))
    before = snapshot(work / "runs/r")
    found = run(work, "resume=runs/r")
    assert found.refused("overrides.yaml") or found.refused("there is no method"), found
    assert snapshot(work / "runs/r") == before


FILES = {
    "empty": b"",
    "mapping": b"a: 1\n",
    "text": b"a\n",
    "binary": bytes(range(256)),
    "aliases": b"- &a x\n- *a\n",
    "tag": b"- !!python/object/apply:os.system [touch attack]\n",
    "large": b"- seed=1\n" * 100_000,
    "numbers": b"- 1\n- 2\n",
    "nested": b"- - seed=1\n",
    "a bomb": b"- [&a [x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]]\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_odd_override_files_are_refused(work, content):
    (work / "runs/r/.hydra/overrides.yaml").write_bytes(content)
    found = run(work, "resume=runs/r")
    assert found.refused("overrides.yaml"), found


@pytest.mark.parametrize("name", ["lock", "run.log", "metrics.csv", "config.yaml", "checkpoints/x", ".hydra/x"])
def test_links_in_a_folder_are_not_followed(work, name):
    target = work.parent / "precious"
    target.write_text("precious")
    place = work / "runs/r" / name
    place.unlink(missing_ok=True)
    place.symlink_to(target)
    found = run(work, "resume=runs/r")
    assert found.refused("is a link or a special file"), found
    assert target.read_text() == "precious"


def test_a_fifo_in_a_folder_is_refused(work):
    os.mkfifo(work / "runs/r/metrics.fifo")
    assert run(work, "resume=runs/r").refused("is a link or a special file")


REPORTS = ["", "[]", '"x"', "{}", '{"versions": []}', '{"identity": 1, "data_fingerprint": {}, "versions": null}', "\0"]


@pytest.mark.parametrize("content", REPORTS, ids=range(len(REPORTS)))
def test_an_odd_report_is_none(work, content):
    (work / "runs/r/report.json").write_text(content)
    found = run(work, "resume=runs/r", "trainer.max_steps=6", limit=60)
    assert found.code == 0, found


REFUSED = {
    "seed=3": "seed was 0, is 3",
    "optimizer.lr=0.1": "optimizer.lr was 0.004, is 0.1",
    "method.temperature=0.3": "method.temperature was 0.2, is 0.3",
    "augment.blur_p=0.25": "augment.blur_p was 0.5, is 0.25",
    "augment.view_b={blur_p:0.1}": "augment.view_b was {}, is {'blur_p': 0.1}",
    "trainer.clip=1": "trainer.clip was None, is 1",
    "scheduler.warmup_epochs=0": "scheduler.warmup_epochs was",
    "optimizer=sgd": "optimizer was AdamW, is SGD",
    "method=moco": "other networks",
    "trainer.max_steps=1": "has done more already",
    "data.images=96": "data was",
}


@pytest.mark.parametrize("change", REFUSED)
def test_changed_knobs_are_refused_and_the_folder_stays_resumable(work, change):
    before = snapshot(work / "runs/r")
    found = run(work, "resume=runs/r", change)
    assert found.refused(REFUSED[change]), found
    after = snapshot(work / "runs/r")
    assert {k: v for k, v in after.items() if k.name != "lock"} == {k: v for k, v in before.items() if k.name != "lock"}


LONG = [
    "data.root=" + " ".join(["a long name"] * 40),
    "data.root='/x/München/it\\'s'",
    "data.root='a \\\\ b'",
    'backbone.name="x"',
    "eval.k=[1, 5]",
]


def test_overrides_are_read_as_they_were_written(tmp_path):
    stored = tmp_path / ".hydra/overrides.yaml"
    stored.parent.mkdir()
    for overrides in (LONG, []):
        stored.write_text(dump_overrides([f"++{text}" for text in overrides]))
        assert read_overrides(tmp_path) == overrides
        assert OmegaConf.to_container(OmegaConf.load(stored)) == overrides


def test_after_refusals_a_plain_resume_goes_on(work):
    assert run(work, "resume=runs/r", "seed=3").refused("seed was 0, is 3")
    assert run(work, "resume=runs/r", "trainer.max_steps=6", limit=60).code == 0


def test_a_changed_learning_rate_is_used_and_recorded_if_asked(work):
    command = ("resume=runs/r", "optimizer.lr=0.1", "resume.exact=false", "trainer.max_steps=6")
    found = run(work, *command, limit=60)
    assert found.code == 0, found
    report = (work / "runs/r/report.json").read_text()
    assert '"base_lr": 0.1' in report
    assert "optimizer.lr was 0.004, is 0.1" in report
    content = torch.load(work / "runs/r/checkpoints/last.ckpt", weights_only=True)
    assert [group["base_lr"] for group in content["optimizer_states"][0]["param_groups"]] == [0.1, 0.1]
    assert "optimizer.lr was 0.004, is 0.1" in content["twoview"]["changes"]


def flip(file, record="data/"):
    """Flip one bit in the middle of the largest record of a PyTorch file."""
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda r: r.file_size if record in r.filename else 0)
    content = bytearray(file.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_noticed_and_the_previous_checkpoint_is_used(work):
    flip(work / "runs/r/checkpoints/last.ckpt")
    found = run(work, "resume=runs/r", "trainer.max_steps=6", limit=60)
    assert found.code == 0, found
    assert "the checksum of" in " ".join(found.out.split())
    assert run(work, "task=knn", "data=fake", "checkpoint=runs/r", "hydra.run.dir=runs/e", limit=60).code == 0


def evaluate(work, checkpoint):
    return run(work, "task=knn", "data=fake", "data.images=64", f"checkpoint={checkpoint}", "hydra.run.dir=runs/e")


def test_a_flipped_bit_is_refused_by_every_task(work):
    flip(work / "runs/r/checkpoints/last.ckpt")
    assert evaluate(work, "runs/r").refused("the checksum of")
    weights = f"backbone.weights={work}/runs/r/checkpoints/last.ckpt"
    assert run(work, *TINY, weights, "hydra.run.dir=runs/w").refused("not a file of plain tensors")


def test_two_unreadable_checkpoints_are_not_overwritten(work):
    for name in ("last.ckpt", "previous.ckpt"):
        flip(work / "runs/r/checkpoints" / name)
    before = snapshot(work / "runs/r/checkpoints")
    found = run(work, "resume=runs/r")
    assert found.code == 2, found
    assert "start again with rerun=true" in found.err
    assert snapshot(work / "runs/r/checkpoints") == before


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def card(path, **changes):
    content = torch.load(path, weights_only=True)
    content["twoview"].update(changes)
    return written(path, content)


def compressed(path):
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


CHECKPOINTS = {
    "pickle": lambda path: path.write_bytes(pickle.dumps(Payload())),
    "pickle in an archive": lambda path: written(path, {"twoview": Payload(), "state_dict": {}}),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("hello"),
    "a list": lambda path: written(path, [1, 2]),
    "no card": lambda path: written(path, {"state_dict": {}}),
    "card of strings": lambda path: written(path, {"twoview": {"method": 1}, "state_dict": {}}),
    "compressed": compressed,
    "name": lambda path: card(path, backbone={"name": "nonsense", "in_chans": 3, "image_size": 16}),
    "pretrained": lambda path: card(path, backbone={"name": "test_resnet", "in_chans": 3, "pretrained": True}),
    "hub": lambda path: card(path, backbone={"name": "hf-hub:a/b", "in_chans": 3, "image_size": 16}),
    "size": lambda path: card(path, image_size=-1),
    "large": lambda path: card(path, image_size=10**9, store_size=10**9),
    "mean": lambda path: card(path, mean=["x", None, []]),
    "short mean": lambda path: card(path, mean=[0.5]),
    "options": lambda path: card(path, backbone={"name": "test_resnet", "in_chans": 3, "options": {"_target_": "x"}}),
    "channels": lambda path: card(path, channels=10**6),
    "seed": lambda path: card(path, seed="x"),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_odd_checkpoints_are_refused(work, name):
    path = work / "runs/r/checkpoints/last.ckpt"
    CHECKPOINTS[name](path)
    found = evaluate(work, "runs/r/checkpoints/last.ckpt")
    assert found.refused("checkpoint="), found
    assert not Path(work, ATTACK).exists()
