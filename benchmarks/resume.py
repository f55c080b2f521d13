"""Compares runs that were killed and resumed with an uninterrupted run, bit by bit; prints a Markdown table.

    python benchmarks/resume.py                       # 20 points, one process; SIGKILL and SIGTERM in turn
    python benchmarks/resume.py --points 5 --ranks 2  # SIGTERM to the process group of two ranks

A point is a random share of the time of the uninterrupted run, from the start of Python to the end of the evaluation.
A killed run is resumed to its end; weights, optimizer state and step of its last checkpoint are then compared.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SHORT = ["method=moco", "trainer.max_epochs=6", "trainer.check_every=1", "eval.baselines=false", "eval.l2=[0.01]"]


def start(folder, *arguments):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)


def same(one, other):
    """Whether two nested containers hold the same values and the same bits of tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def result(run):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {key: content[key] for key in ("global_step", "epoch", "state_dict", "optimizer_states")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="of the runs, such as method=simclr")
    arguments = parser.parse_args()
    overrides = [*SHORT, *arguments.overrides]
    if arguments.ranks > 1:
        overrides += ["trainer=ddp", f"trainer.devices={arguments.ranks}"]
    draw = random.Random(arguments.seed)
    print(f"{' '.join(overrides)}, torch {torch.__version__}, {os.cpu_count()} cores\n")
    print("| point | signal | exit code | last saved step | last checkpoint identical |\n|---|---|---|---|---|")
    identical = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        begin = time.perf_counter()
        assert start(folder, *overrides, f"hydra.run.dir={folder}/whole").wait() == 0, (
            folder / "output.txt"
        ).read_text()
        seconds, wanted = time.perf_counter() - begin, result(folder / "whole")
        for point in range(arguments.points):
            run = folder / f"run{point}"
            number = signal.SIGTERM if point % 2 or arguments.ranks > 1 else signal.SIGKILL
            share = draw.random()
            process = start(folder, *overrides, f"hydra.run.dir={run}")
            time.sleep(share * seconds)
            if process.poll() is None:
                os.killpg(process.pid, number)
            code = process.wait()
            saved = result(run)["global_step"] if (run / "checkpoints" / "last.ckpt").exists() else "none"
            # A run that was killed before it had a folder is started again.
            known = (run / ".hydra" / "overrides.yaml").exists()
            again = [f"resume={run}"] if known else [*overrides, f"hydra.run.dir={run}"]
            ended = start(folder, *again).wait()
            equal = ended == 0 and same(wanted, result(run)) and (run / "report.json").exists()
            identical += equal
            print(f"| {share:.2f} | {number.name} | {code} | {saved} | {'yes' if equal else 'NO'} |", flush=True)
    print(f"\n{identical} of {arguments.points} identical")
    sys.exit(identical != arguments.points)


if __name__ == "__main__":
    main()
