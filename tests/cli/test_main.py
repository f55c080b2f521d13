import json
import os
import platform
import re
import shlex
import subprocess
import sys

import pytest
from commands import train
from hostile_runs import run
from omegaconf import OmegaConf
from two_ranks import as_script

from twoview import allocator
from twoview.cli import sweeps

SHORT = ["trainer.max_epochs=1", "data.image_size=10", "eval.baselines=false"]
SHORT += ["backbone.name=test_resnet", "backbone.stem=small_stride2"]


def test_a_sweep_has_a_folder_for_every_run_and_goes_on_after_a_failure(tmp_path):
    result = run(tmp_path, "-m", "method.temperature=0.1,0,0.5", *SHORT, limit=120)
    assert result.code == 1
    assert "method.temperature=0: must be above 0" in result.err
    runs = sweeps.outcomes(next(tmp_path.glob("sweeps/*/table.csv")).parent)
    assert [run["mistake"] is None for run in runs] == [True, False, True]
    assert [run["figure"] is None for run in runs] == [False, True, False]


def test_every_method_runs_by_its_name(tmp_path):
    names = ["moco", "moco_v1", "moco_v3", "supcon", "nnclr"]
    result = run(tmp_path, "-m", f"method={','.join(names)}", *SHORT, limit=250)
    assert result.code == 0, result.err
    done = sweeps.outcomes(next(tmp_path.glob("sweeps/*/table.csv")).parent)
    reports = [json.loads((tmp_path / run["folder"] / "report.json").read_text()) for run in done]
    assert [r["method"] for r in reports] == ["MoCo", "MoCo", "MoCoV3", "SupCon", "NNCLR"]
    assert [r["training"]["batches_without_step"] for r in reports] == [1, 1, 0, 0, 1]


def test_two_processes_from_the_same_command(tmp_path):
    two = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "method=moco"]
    result = run(tmp_path, *two, *SHORT, limit=250, prepare=as_script)
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    (file,) = tmp_path.glob("runs/*/*/report.json")
    report = json.loads(file.read_text())
    assert report["training"]["processes"] == 2
    assert report["training"]["images_seen"] == report["training"]["batch_size"] * (report["training"]["steps"] + 1)
    assert len(list(tmp_path.glob("runs/*/*"))) == 1
    assert result.out.count("report: ") == 1
    said = [line for line in (file.parent / "run.log").read_text().splitlines() if "images, test_resnet, batch" in line]
    assert ["rank 1" in line for line in said] == [False, True]


def test_from_another_folder_and_then_the_probe_of_what_it_printed(tmp_path):
    result = train(*SHORT, "seed=3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    again = re.search(r"more:\s+python \S*train.py (.*)", result.stdout)[1]
    result = run(tmp_path, *shlex.split(again), "eval.shift_images=20", "eval.draws=2", limit=120)
    assert result.code == 0, result.err
    first, second = (json.loads(p.read_text()) for p in sorted(tmp_path.glob("runs/*/*/report.json")))
    assert second["results"]["trained"]["linear"] == first["results"]["trained"]["linear"]
    assert (second["task"], second["seed"]) == ("evaluate", 3)
    config = min(tmp_path.glob("runs/*/*/config.yaml")).read_text()  # of the first run
    assert "image_size: 10" in config
    assert "${" not in config


@pytest.mark.parametrize(("flags", "level"), [([], "INFO"), (["-v"], "DEBUG"), (["--verbose"], "DEBUG")])
def test_verbose_is_the_level_of_the_console(flags, level, tmp_path):
    result = run(tmp_path, *flags, "--cfg", "hydra", "method=moco")
    assert result.code == 0, result.err
    logs = OmegaConf.create(result.out).hydra.job_logging
    assert logs.handlers.console.level == level
    assert "level" not in logs.handlers.file
    assert logs.loggers.twoview.level == "DEBUG"


def test_garbage_is_collected_after_the_import_but_not_among_modules():
    code = "import gc; from twoview.cli.imports import import_runs as get; assert get() is get()"
    code += "; print(gc.isenabled(), gc.get_freeze_count() > 1e5, len(gc.get_objects()) < 1e5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["True"] * 3


# Prints for tensors of 20 and 40 MiB whether each has a block of memory of its own.
BLOCKS = """
import ctypes
import torch
from twoview.cli.imports import import_runs

import_runs()
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
library = ctypes.CDLL(None)
library.mallinfo2.restype = type("", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
tensors = []
for size in (20, 40):
    before = library.mallinfo2().hblks
    tensors.append(torch.empty(size * 2**20, dtype=torch.uint8))
    print(library.mallinfo2().hblks > before)
"""


@pytest.mark.skipif(
    not hasattr(allocator._glibc(), "mallinfo2") or platform.machine() != "x86_64",
    reason="this C library is not glibc 2.33 or newer, or torch does not use its allocator",
)
@pytest.mark.parametrize(
    ("given", "blocks"), [({}, "False True"), ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, "True True")]
)
def test_tensors_up_to_32_mib_share_memory_unless_the_environment_sets_glibc(given, blocks):
    command, variables = [sys.executable, "-c", BLOCKS], {**os.environ, **given}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=variables)
    assert done.stdout.split() == blocks.split()
