"""Embedding of a folder: memory, speed beside a plain PyTorch loop over the same files, and runs that are killed.

python benchmarks/embed.py --root CIFAR10                              # 6,000 and 60,000 files, and 5 kills
python benchmarks/embed.py --root CIFAR10 --counts 500 2000 --part 256 --workers 0   # a small form

``--root`` is a folder of at least as many image files, of any nesting, such as the 60,000 JPEG files of CIFAR-10. Each
row runs in a process of its own. The plain loop is a DataLoader over PIL images with torchvision's transforms, the same
network and the same batches; its features are kept in memory and written by ``torch.save``. Seconds begin before the
files are listed and end with the written file; imports do not count. Processor seconds include loader processes. The
memory is the largest proportional set size of the process and its loader processes, sampled five times a second.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from many_files import peak_of
from PIL import Image
from side_by_side import begin, save
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import twoview
from twoview.data.decode import SUFFIXES
from twoview.tools import embed, embedding_parts, read_embeddings

BATCH = 256
STARTED = "started"  # printed when the imports are done


def load(checkpoint: str) -> twoview.Encoder:
    """The network; with the preprocessing of ``experiment=cifar10_cpu`` if it has random weights."""
    if checkpoint.startswith("random:"):
        return twoview.load(checkpoint, image_size=32).with_card(store_size=32, resize_size=32)
    return twoview.load(checkpoint)


class Files(Dataset[torch.Tensor]):
    """Image files as a plain loop reads them: PIL, then torchvision's transforms."""

    def __init__(self, paths: list[str], encoder: twoview.Encoder) -> None:
        self.paths, preprocess = paths, encoder.preprocess
        self.transform = transforms.Compose(
            [
                transforms.Resize(preprocess.resize_size),
                transforms.CenterCrop(preprocess.image_size),
                transforms.ToTensor(),
                transforms.Normalize(preprocess.mean.flatten().tolist(), preprocess.std.flatten().tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            found: torch.Tensor = self.transform(image.convert("RGB"))
            return found


@torch.inference_mode()
def plain(encoder: twoview.Encoder, files: str, to: str, workers: int) -> None:
    """The loop that a user would write."""
    paths = Path(files).read_text().splitlines()
    loader = DataLoader(Files(paths, encoder), BATCH, num_workers=workers)
    torch.save(torch.cat([encoder.network(batch) for batch in loader]), to)


def run(kind: str, files: str, to: str, given: argparse.Namespace) -> None:
    """One row, in a process of its own; prints its figures."""
    if given.part:
        embedding_parts.PART = given.part
    encoder = load(given.checkpoint)
    print(STARTED, flush=True)
    start, used = time.perf_counter(), sum(os.times()[:4])
    if kind == "plain":
        plain(encoder, files, to, given.workers)
    else:
        from twoview.data import folder

        options = {"num_workers": given.workers, "batch_size": BATCH}
        embed(encoder, lambda **sizes: folder(files, **sizes, **options), to)
    print(json.dumps({"seconds": time.perf_counter() - start, "processor": sum(os.times()[:4]) - used}))


def start(kind: str, files: Path, to: Path, given: argparse.Namespace) -> subprocess.Popen[str]:
    """Start a row in a process of its own, which is the leader of a process group."""
    command = [sys.executable, __file__, "--root", given.root, "--checkpoint", given.checkpoint]
    command += ["--workers", str(given.workers), "--part", str(given.part), "--run", kind, str(files), str(to)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def measure(kind: str, files: Path, to: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Figures of one row."""
    process = start(kind, files, to, given)
    peak = peak_of(process)[0]
    assert process.stdout is not None
    return {**json.loads(process.stdout.read().splitlines()[-1]), "megabytes": peak}


def compare(files: Path, count: int, scratch: str, given: argparse.Namespace) -> tuple[list[dict[str, Any]], Path]:
    """Rows of both loops over the same files, which are printed; and the file of embeddings."""
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "twoview": []}
    outputs = {"plain": Path(scratch) / f"{count}.pt", "twoview": Path(scratch) / f"{count}.parquet"}
    for _ in range(given.repeats):  # in turns, so that a slow phase of the machine is spread over both
        for kind, to in outputs.items():
            to.unlink(missing_ok=True)
            found[kind].append(measure(kind, files, to, given))
    difference = (torch.load(outputs["plain"]) - read_embeddings(outputs["twoview"]).vectors).abs().max().item()
    rows = []
    for kind, figures in found.items():
        seconds, processor = (min(x[name] for x in figures) for name in ("seconds", "processor"))
        row = {"files": count, "loop": kind, "per_second": count / seconds, "per_processor": count / processor}
        rows.append({**row, "megabytes": max(x["megabytes"] for x in figures), "difference": difference})
        cells = [f"{count:,}", kind, f"{count / seconds:,.0f}", f"{count / processor:,.0f}"]
        memory = f"{rows[-1]['megabytes']:,.0f}"
        print(f"| {' | '.join([*cells, memory, f'{difference:.1e}'])} |", flush=True)
    return rows, outputs["twoview"]


def kill_at_random(files: Path, to: Path, seconds: float, given: argparse.Namespace) -> int:
    """Run, kill the processes at ``--kills`` random moments, and finish; returns the number of killed runs."""
    rng, killed = random.Random(0), 0
    for _ in range(given.kills):
        process = start("twoview", files, to, given)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 1.5 * seconds / given.kills))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        there = len(list(to.with_name(f"{to.name}.parts").glob("*-*.parquet")))
        print(f"killed at a random moment: {there} finished parts", file=sys.stderr)
    measure("twoview", files, to, given)
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of image files")
    parser.add_argument("--checkpoint", default="random:resnet10_narrow", help="network, as for twoview.load")
    parser.add_argument("--counts", type=int, nargs="+", default=[6_000, 60_000], help="numbers of files")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="loader processes of each loop")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the fastest counts")
    parser.add_argument("--kills", type=int, default=5, help="random moments at which runs are killed")
    parser.add_argument("--part", type=int, default=0, help="images of a part, for small forms; 0 for 4,096")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # a row: kind, list of files, file to write
    given = parser.parse_args()
    if given.run:
        run(*given.run, given)
        return
    every = sorted(str(f) for f in Path(given.root).rglob("*") if f.suffix.lower() in SUFFIXES)
    if len(every) < max(given.counts):
        raise SystemExit(f"--root={given.root}: {len(every)} image files; give --counts up to this number")
    columns = ["files", "loop", "images/s", "images per processor second", "peak MB", "largest difference"]
    facts = {"threads": torch.get_num_threads(), "workers": given.workers, "checkpoint": given.checkpoint}
    provenance = begin("Embedding of a folder of images", columns=columns, extra_packages=["pyarrow"], **facts)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in given.counts:
            files = Path(scratch) / f"{count}.txt"
            files.write_text("\n".join(every[i * len(every) // count] for i in range(count)))
            found, written = compare(files, count, scratch, given)
            rows += found
        resumed = Path(scratch) / "killed.parquet"
        killed = kill_at_random(files, resumed, count / rows[-1]["per_second"], given)
        same = resumed.read_bytes() == written.read_bytes()
        rows.append({"files": count, "loop": "killed", "killed": killed, "same": same})
        state = "the same bytes" if same else "ANOTHER FILE"
        print(f"\nkilled {killed} times and resumed, {count:,} files: {state} as without interruption")
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
