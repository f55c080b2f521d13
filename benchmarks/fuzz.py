"""Damaged input: random changes of checkpoints, images, shards, lists and overrides, each read in a process of its own.

    python benchmarks/fuzz.py              2,000 cases
    python benchmarks/fuzz.py 200 7        200 cases of another seed

Each case changes a valid file (flipped, removed or inserted bytes, or text that is dangerous where it is interpreted)
and reads it as a user's command would. It must end within 20 seconds, in success or in one UserError: no other
exception, no program that is started, no connection, no file that is written outside of the case's folder.
Needs the extras parquet and tiff.
"""

import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from twoview import load
from twoview.backbones import create_backbone
from twoview.cli.overrides import check_overrides, quoted
from twoview.cli.resume import resolve_resume
from twoview.data import digits, folder, parquet, webdataset
from twoview.errors import UserError
from twoview.evaluation import EvaluationSettings
from twoview.evaluation.cache import cached
from twoview.evaluation.compare import compare
from twoview.reporting.figures import curves
from twoview.runs import pretrain
from twoview.training import Recipe, RunSettings, TrainerSettings

LIMIT = 20  # seconds
LOAD = {"image_size": 16, "num_workers": 0, "max_broken": 0.9}
DANGEROUS = (
    "_target_", "${oc.env:HOME}", "../../", "/dev/zero", "!!python/object/apply:os.system [id]", "*a", "&a ", "\0", "=",
    "++x=1", "hydra.run.dir=/tmp/x", "-1", "1e400", "NaN", "\n- ", "{", "[", "'", "\\", "\ud7ff", "9" * 400,
)  # fmt: skip
# What a reader of data has no business to do.
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "socket.bind")


def write_images(root: Path) -> None:
    """Images of many formats, in two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg", "c.tif", "d.webp", "e.bmp", "f.gif", "g.ppm", "h.jp2", "i.ico", "j.tga"):
        target = root / ("x" if name < "f" else "y") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)
    np.save(root / "x" / "k.npy", pixels)


def write_inputs(root: Path) -> None:
    """One valid input of each kind."""
    write_images(root / "images")
    files = sorted((root / "images").rglob("*.*"))
    (root / "lists").mkdir()
    (root / "lists" / "list.txt").write_text("".join(f"{file}\n" for file in files))
    rows = "".join(f"{file},{file.parent.name}\n" for file in files)
    (root / "lists" / "list.csv").write_text(f"path,label\n{rows}")
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "s.tar", "w") as shard:
        for number, file in enumerate(files):
            shard.add(file, f"{number:04}{file.suffix}")
            label = tarfile.TarInfo(f"{number:04}.{'cls' if number % 2 else 'json'}")
            content = b"1" if number % 2 else b'{"label": 0}'
            label.size = len(content)
            shard.addfile(label, io.BytesIO(content))
    import pyarrow
    import pyarrow.parquet

    (root / "tables").mkdir()
    table = {"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files], "label": [0, 1] * 5 + [0]}
    pyarrow.parquet.write_table(pyarrow.table(table), root / "tables" / "t.parquet")
    recipe = Recipe(backbone=partial(create_backbone, "test_resnet", in_chans=1, image_size=16))
    quick = EvaluationSettings.from_knobs(parts=["knn"], baselines=False, bootstrap=100)
    stored = {".hydra/overrides.yaml": "- method=simclr\n- data.image_size=16\n- optimizer.lr=0.004\n"}
    run = RunSettings(run_dir=root / "run", files=stored)
    pretrain(partial(digits, image_size=16), recipe, TrainerSettings(max_steps=2, check_every=0), quick, run)
    (root / "run" / "metrics.csv").write_text("epoch,step,train/loss\n0,1,5.5\n0,2,5.4\n")
    shutil.copytree(root / "run", root / "other")
    save_file(create_backbone("test_resnet", in_chans=1, image_size=16)[0].state_dict(), root / "run/w.safetensors")


def damage(content: bytes, draw: random.Random) -> bytes:
    """Content with one to eight random changes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        place, kind = draw.randrange(len(changed) + 1), draw.randrange(5)
        if kind <= 1 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del changed[place : place + draw.choice((1, 4, 64, 4096))]
        elif kind == 3:
            changed[place:place] = draw.choice(DANGEROUS).encode(errors="surrogatepass")
        else:
            changed[place : place + 8] = draw.randbytes(8)
    return bytes(changed)


def read_overrides(root: Path) -> object:
    """As ``resume=run`` does before torch is imported."""
    return check_overrides(resolve_resume([f"resume={root / 'run'}"], sweep=False))


def read_command(root: Path) -> object:
    """As a command line does; the changed file holds one argument a line."""
    text = (root / "run/.hydra/overrides.yaml").read_text(errors="replace")
    return check_overrides([quoted(line.removeprefix("- ")) for line in text.splitlines()])


def read_encoder(root: Path) -> object:
    """As ``task=evaluate`` does."""
    return load(root / "run")(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))


def all_pixels(images) -> object:
    """Read images, those that are decoded on access too."""
    return images.pretrain[list(range(len(images.pretrain)))]


# Files that are changed, and what reads them.
KINDS = {
    "checkpoint": ("run/checkpoints/last.ckpt", read_encoder),
    "weights (.ckpt)": ("run/checkpoints/last.ckpt", lambda root: create_backbone(
        "test_resnet", 1, 16, weights=root / "run/checkpoints/last.ckpt")),
    "weights (.safetensors)": ("run/w.safetensors", lambda root: create_backbone(
        "test_resnet", 1, 16, weights=root / "run/w.safetensors")),
    "image files": ("images/*/*", lambda root: all_pixels(folder(root / "images", **LOAD))),
    "image files, not in memory": ("images/*/*", lambda root: all_pixels(
        folder(root / "images", memory=0, cache=False, **LOAD))),
    "lists": ("lists/*", lambda root: folder(next((root / "lists").glob("*")), **LOAD)),
    "shards": ("shards/*", lambda root: all_pixels(webdataset(str(root / "shards"), **LOAD))),
    "Parquet": ("tables/*", lambda root: all_pixels(parquet(str(root / "tables"), **LOAD))),
    "stored overrides": ("run/.hydra/overrides.yaml", read_overrides),
    "command line": ("run/.hydra/overrides.yaml", read_command),
    "reports": ("run/*.json", lambda root: compare([root / "other", root / "run"], seed=0, resamples=100)),
    "predictions": ("run/*.safetensors", lambda root: compare([root / "other", root / "run"], seed=0, resamples=100)),
    "metrics.csv": ("run/metrics.csv", lambda root: curves(root / "run/metrics.csv")),
    "cache": ("run/checkpoints/last.ckpt", lambda root: cached(
        str(root / "run/checkpoints"), lambda: "last", dict, bool)),
}  # fmt: skip


def watch(root: Path) -> None:
    """End the process with code 99 when it does what is forbidden."""

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        place = os.path.abspath(str(arguments[0])) if writes else ""
        if event.startswith(FORBIDDEN) or (writes and not place.startswith((str(root), "/dev/null"))):
            os.write(2, f"FORBIDDEN {event} {arguments}\n".encode(errors="replace"))
            os._exit(99)

    sys.addaudithook(hook)


def case(kind: str, number: int, seed: int, inputs: Path, log: Path) -> str:
    """Run one case: "read", "refused", or what went wrong."""
    draw = random.Random(f"{seed}/{number}")
    pattern, read = KINDS[kind]
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    shutil.copytree(inputs, root, dirs_exist_ok=True)
    target = draw.choice(sorted(file for file in root.glob(pattern) if file.is_file()))
    if kind == "lists":
        for other in (root / "lists").iterdir():
            if other != target:
                other.unlink()
    target.write_bytes(damage(target.read_bytes(), draw))
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            logging.disable()
            watch(root)
            read(root)
            code = 0
        except UserError as error:
            code = 2 if len(str(error).splitlines()) == 1 else 3
            os.write(2, str(error).encode(errors="replace"))
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="replace"))
        finally:
            os._exit(code)
    end, status = time.monotonic() + LIMIT, None
    while status is None and time.monotonic() < end:
        found, raw = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(raw) if found else None
        time.sleep(0.002)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    shutil.rmtree(root)
    names = {0: "read", 2: "refused", 3: "several lines", 99: "forbidden", None: "time limit"}
    return names.get(status, "other exception" if status == 1 else f"signal {status}")


def main(cases: int = 2000, seed: int = 0) -> None:
    """Run all cases and print a table; what went wrong is printed in full."""
    inputs, log = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp()) / "stderr"
    child = os.fork()  # pyarrow starts threads, which would not survive the forks below
    if not child:
        write_inputs(inputs)
        os._exit(0)
    os.waitpid(child, 0)
    results: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    start = time.monotonic()
    for number in range(cases):
        kind = list(KINDS)[number % len(KINDS)]
        found = case(kind, number, seed, inputs, log)
        results[kind][found] += 1
        if found not in ("read", "refused"):
            print(f"case {number}, {kind}: {found}\n{log.read_text(errors='replace')[-3000:]}", flush=True)
    for kind, counts in results.items():
        print(f"{kind:28} {json.dumps(counts)}")
    bad = sum(n for counts in results.values() for found, n in counts.items() if found not in ("read", "refused"))
    print(f"{cases} cases, seed {seed}, {time.monotonic() - start:.0f} s: {bad} went wrong")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
