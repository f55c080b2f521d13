"""Memory, and time to the first step, of a run that decodes images in every epoch: 1,000 and 100,000 small files.

    python benchmarks/many_files.py
    python benchmarks/many_files.py --counts 100 300 --steps 5  # to try it

Writes JPEG files to a temporary folder and trains 60 steps on each number of them, with two loader processes and no
images held in memory. Prints the peak memory of all processes together (proportional set size, in which a shared page
counts once, and resident set size, in which it counts in each process), the seconds from the start of ``pretrain`` to
the first optimizer step, and the seconds of the whole run including imports.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any


def write_files(root: Path, count: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(500):
        buffer = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((40, 36), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    for i in range(count):
        folder = root / f"folder {i // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"image {i:06d}.jpg").write_bytes(encoded[i % len(encoded)])


def train(root: str, run_dir: str, steps: int) -> None:
    """A short run, in its own process; prints the seconds to the first step."""
    from lightning.pytorch.loggers.logger import DummyLogger

    from twoview import runs
    from twoview.backbones import create_backbone
    from twoview.data import folder
    from twoview.heads import projection_head
    from twoview.methods import SimCLR
    from twoview.optim import OptimizerSettings
    from twoview.schedules import constant
    from twoview.training.settings import Recipe, RunSettings, TrainerSettings

    class FirstStep(DummyLogger):  # type: ignore[misc]
        first: float | None = None

        def log_metrics(self, *_: Any, **__: Any) -> None:
            self.first = self.first or time.perf_counter()

    logger, start = FirstStep(), time.perf_counter()
    recipe = Recipe(
        method=partial(SimCLR, temperature=0.2),
        backbone=partial(create_backbone, "test_resnet", image_size=32),
        head=partial(projection_head, hidden_dim=64, out_dim=32),
        optimizer=OptimizerSettings(lr=1e-3),
        schedule=constant,
    )
    runs.pretrain(
        partial(folder, root, image_size=32, batch_size=256, memory=0, cache=False, num_workers=2),
        recipe,
        TrainerSettings(max_epochs=None, max_steps=steps, log_every=1, check_every=0),
        run=RunSettings(run_dir=run_dir, loggers=[logger]),
    )
    assert logger.first is not None
    print(json.dumps({"first_step": logger.first - start}))


def peak_of(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Largest sums of PSS and RSS over a process and its children, in MB, sampled five times a second."""
    pss = rss = 0.0
    while process.poll() is None:
        sums = {"Pss": 0.0, "Rss": 0.0}
        for pid in [process.pid, *_children(process.pid)]:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # the process has ended
                continue
            for line in lines:
                name, _, value = line.partition(":")
                if name in sums:
                    sums[name] += int(value.split()[0]) / 1024
        pss, rss = max(pss, sums["Pss"]), max(rss, sums["Rss"])
        time.sleep(0.2)
    return pss, rss


def _children(pid: int) -> list[int]:
    try:
        below = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return below + [p for child in below for p in _children(child)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 100_000], help="numbers of files")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps, the same for all numbers of files")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)  # the run itself: folder of images, run folder
    arguments = parser.parse_args()
    if arguments.train:
        train(*arguments.train, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'files':>8} {'peak PSS MB':>12} {'peak RSS MB':>12} {'s to step 1':>12} {'s in total':>10}")
        for count in arguments.counts:
            root = Path(scratch) / str(count)
            write_files(root, count)
            command = [sys.executable, __file__, "--steps", str(arguments.steps)]
            command += ["--train", str(root), str(Path(scratch) / f"run{count}")]
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            pss, rss = peak_of(process)
            whole = time.perf_counter() - start
            assert process.stdout is not None
            lines = process.stdout.read().splitlines()
            first = json.loads(lines[-1])["first_step"]
            print(f"{count:8,} {pss:12.0f} {rss:12.0f} {first:12.1f} {whole:10.1f}")


if __name__ == "__main__":
    main()
