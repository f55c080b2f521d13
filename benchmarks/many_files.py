"""Memory and time to the first step of a streamed run, on 100,000 small files against 1,000.

    python benchmarks/many_files.py

Writes JPEG files into a temporary folder, trains 60 steps on each number of them with two loader processes and nothing
held in memory, and prints the peak of the memory of all processes together (proportional set size, so that shared pages
count once; and resident set size, where they count in each), the seconds from the start of ``pretrain`` to the first
optimiser step, and those of the whole run with its imports.
"""

import io
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

COUNTS = (1_000, 100_000)
STEPS = 60  # for both, so that what differs is the files


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
        (folder / f"picture {i:06d}.jpg").write_bytes(encoded[i % len(encoded)])


def train(root: str, run_dir: str) -> None:
    """A short run, in a process of its own; prints the seconds to the first step."""
    from lightning.pytorch.loggers.logger import DummyLogger

    from twoview import runs, schedules
    from twoview.augment import TwoViews
    from twoview.data import folder
    from twoview.heads import projection_head
    from twoview.methods import SimCLR
    from twoview.optim import Optimization

    class FirstStep(DummyLogger):  # type: ignore[misc]
        first: float | None = None

        def log_metrics(self, *_: Any, **__: Any) -> None:
            self.first = self.first or time.perf_counter()

    import torch

    logger, start = FirstStep(), time.perf_counter()
    runs.pretrain(
        lambda: folder(root, image_size=32, batch_size=256, memory=0, num_workers=2),
        method=partial(SimCLR, temperature=0.2),
        backbone={"name": "test_resnet", "image_size": 32},
        head=partial(projection_head, hidden_dim=64, out_dim=32),
        augment=TwoViews,
        optimization=Optimization(torch.optim.AdamW, lr=1e-3),
        schedule=schedules.constant,
        training=runs.Training(max_epochs=None, max_steps=STEPS, log_every=1, check_every=0),
        loggers=[logger],
        run_dir=run_dir,
    )
    assert logger.first is not None
    print(json.dumps({"first_step": logger.first - start}))


def peak_of(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Greatest sums of PSS and RSS over a process and its children, in MB, sampled five times a second."""
    pss = rss = 0.0
    while process.poll() is None:
        sums = {"Pss": 0.0, "Rss": 0.0}
        for pid in [process.pid, *_children(process.pid)]:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it has just ended
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
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'files':>8} {'peak PSS MB':>12} {'peak RSS MB':>12} {'s to step 1':>12} {'s in all':>10}")
        for count in COUNTS:
            root = Path(scratch) / str(count)
            write_files(root, count)
            command = [sys.executable, __file__, str(root), str(Path(scratch) / f"run{count}")]
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            pss, rss = peak_of(process)
            whole = time.perf_counter() - start
            assert process.stdout is not None
            lines = process.stdout.read().splitlines()
            first = json.loads(lines[-1])["first_step"]
            print(f"{count:8,} {pss:12.0f} {rss:12.0f} {first:12.1f} {whole:10.1f}")


if __name__ == "__main__":
    train(*sys.argv[1:]) if len(sys.argv) > 1 else main()
