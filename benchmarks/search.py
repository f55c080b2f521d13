"""Speed, recall and memory of an index, exact and approximate; adding and removing beside building anew.

    python benchmarks/search.py                                # 1,000,000 vectors of 256 dimensions
    python benchmarks/search.py --vectors 50000                # a small form, a few minutes
    python benchmarks/search.py --kinds exact hnsw --uniform   # uniformly distributed vectors, the worst case

Vectors lie around 1,000 random centers. The deviations from a center have as much variance as the centers, and a
spectrum that decays as 1 / i, like features do. Uniformly distributed vectors have no near neighbors, which is the
worst case for a graph; features are not like this.

Each index is built in a process of its own, and searched in another one that loads it from its file. Building uses all
cores, searching one thread, whose seconds of the processor are measured. Memory is the resident memory after the
search, less the one before the index is loaded; of exact search, it is that of the mapped file, which the system can
take back. Recall@10 is that of new vectors of the same distribution against exact search. "Stored recall" is what the
index has measured itself, with stored vectors that it left out meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from side_by_side import begin, save

from twoview.tools import Index, IndexSettings

HASH = "benchmark"
CENTERS = 1000
BLOCK = 50_000
BATCH = 1000  # queries at once
COLUMNS = (
    *("index", "minutes to build", "MB on disk", "MB of memory", "recall@10", "stored recall"),
    *("queries/s, 1,000 at once", "ratio", "queries/s, one by one", "ratio"),
)


def sample(count, dim, seed, uniform):
    """Vectors fp32 ``[count, dim]``, not normalized."""
    generator = torch.Generator().manual_seed(1 + seed)
    noise = torch.randn(count, dim, generator=generator)
    if uniform:
        return noise
    centers = torch.randn(CENTERS, dim, generator=torch.Generator().manual_seed(0))
    spectrum = 1 / torch.arange(1, dim + 1)
    noise *= (spectrum * dim / spectrum.sum()).sqrt()
    return centers[torch.randint(0, CENTERS, (count,), generator=generator)] + noise


def write_vectors(path, given):
    """Write the vectors as ``.npy``, some at a time."""
    file = np.lib.format.open_memmap(path, "w+", np.float32, (given.vectors, given.dim))
    for number, start in enumerate(range(0, given.vectors, BLOCK)):
        count = min(BLOCK, given.vectors - start)
        file[start : start + count] = sample(count, given.dim, number, given.uniform).numpy()
    file.flush()


def resident():
    """Resident memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def build(given, folder):
    """Build an index and write it."""
    vectors = torch.from_numpy(np.load(folder / "vectors.npy", mmap_mode="c"))
    start, cpu = time.perf_counter(), time.process_time()
    index = Index.build(
        HASH, vectors, IndexSettings(given.measure[1], links=given.links, construction=given.construction)
    )
    index.save(folder / given.measure[1])
    effort = 0 if index._engine is None else index._engine.effort
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return {**seconds, "bytes": (folder / given.measure[1]).stat().st_size, "recall": index.recall, "effort": effort}


def search(given, folder):
    """Load an index and search it, on one thread."""
    torch.set_num_threads(1)
    queries = sample(given.queries, given.dim, 10**6, given.uniform)
    before = resident()
    index = Index.load(folder / given.measure[1])
    found, speed = [], {}
    for name, size, count in (("batch", BATCH, given.queries), ("single", 1, min(50, given.queries))):
        index.search(HASH, queries[:size])  # pages of the file are read
        start = time.process_time()
        found.append([index.search(HASH, part).ids for part in queries[:count].split(size)])
        speed[name] = count / (time.process_time() - start)
    memory, ids = resident() - before, torch.cat(found[0]).numpy()
    if given.measure[1] == "exact":
        np.save(folder / "truth.npy", ids)
    truth = np.load(folder / "truth.npy")
    right = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(ids.tolist(), truth.tolist(), strict=True)])
    return {"memory": memory, "found": right, **speed}


def increments(given, folder):
    """Replace a tenth of the vectors in ten steps, and compare the result with an index that is built anew."""
    kind, count = given.measure[1], min(given.vectors, given.changed)
    vectors = torch.from_numpy(np.load(folder / "vectors.npy", mmap_mode="c"))[:count]
    settings = IndexSettings(kind, links=given.links, construction=given.construction)
    first, step = count * 9 // 10, count // 100
    changed = Index.build(HASH, vectors[:first], settings)
    order = torch.randperm(first, generator=torch.Generator().manual_seed(0))
    for i in range(10):
        changed.remove(order[i * step : (i + 1) * step])
        changed.add(HASH, vectors[first + i * step : first + (i + 1) * step])
    kept = changed.ids
    rebuilt = Index.build(HASH, vectors[kept], settings, ids=kept)
    truth = Index.build(HASH, vectors[kept], IndexSettings("exact"), ids=kept)
    queries = sample(given.queries, given.dim, 10**6, given.uniform)
    a, b, c = (index.search(HASH, queries) for index in (changed, rebuilt, truth))
    hits = [(x.ids[:, :, None] == c.ids[:, None]).any(2).double().mean().item() for x in (a, b)]
    equal = bool(torch.equal(a.ids, b.ids) and torch.equal(a.similarity, b.similarity))
    return {"changed": hits[0], "rebuilt": hits[1], "equal": equal, "vectors": len(changed)}


def measured(given, scratch, what, kind):
    """Result of a function in a process of its own."""
    options = ("vectors", "dim", "queries", "links", "construction", "changed")
    command = [sys.executable, __file__, "--measure", what, kind, scratch]
    command += [f"--{name}={getattr(given, name)}" for name in options]
    threads = "1" if what == "search" else str(given.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    uniform = ["--uniform"] if given.uniform else []
    done = subprocess.run([*command, *uniform], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(given, scratch, kinds):
    """Measure and print one row for each kind, exact first."""
    rows = []
    for kind in kinds:
        row = {"name": kind, **measured(given, scratch, "build", kind), **measured(given, scratch, "search", kind)}
        rows.append(row)
        stored = "-" if row["recall"] is None else f"{row['recall']['value']:.3f}"
        parts = {"hnsw": f"links={given.links} construction={given.construction}, effort {row['effort']}"}
        parts |= {"ivfpq": f"{row['effort']} lists searched"}
        cells = [f"{kind} {parts.get(kind, '')}".strip(), f"{row['seconds'] / 60:.1f}", f"{row['bytes'] / 1e6:,.0f}"]
        cells += [f"{row['memory'] / 1e6:,.0f}", f"{row['found']:.3f}", stored]
        for name in ("batch", "single"):
            cells += [f"{row[name]:,.0f}", f"{row[name] / rows[0][name]:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=("exact", "hnsw", "ivfpq"), default=["exact", "hnsw", "ivfpq"])
    parser.add_argument("--links", type=int, default=IndexSettings.links)
    parser.add_argument("--construction", type=int, default=IndexSettings.construction)
    parser.add_argument("--changed", type=int, default=50_000, help="vectors of the comparison with building anew")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads that build")
    parser.add_argument("--uniform", action="store_true", help="uniformly distributed vectors")
    parser.add_argument("--json", help="file for the tables with provenance")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(
            json.dumps(
                {"build": build, "search": search, "increments": increments}[given.measure[0]](
                    given, Path(given.measure[2])
                )
            )
        )
        return
    kinds = sorted({"exact", *given.kinds})  # what the others are compared with comes first
    facts = {"vectors": given.vectors, "dimensions": given.dim, "uniform": given.uniform, "threads": given.threads}
    provenance = begin("Search of an index", extra_packages=["faiss-cpu"], columns=COLUMNS, **facts)
    with tempfile.TemporaryDirectory() as scratch:
        write_vectors(Path(scratch) / "vectors.npy", given)
        rows = table(given, scratch, kinds)
        columns = ("index", "vectors", "recall@10, changed in ten steps", "recall@10, built anew", "equal in every bit")
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
        changes = [{"name": kind, **measured(given, scratch, "increments", kind)} for kind in kinds]
    for row in changes:
        equal = "yes" if row["equal"] else "no"
        print(f"| {row['name']} | {row['vectors']:,} | {row['changed']:.3f} | {row['rebuilt']:.3f} | {equal} |")
    save(given.json, provenance, [*rows, *changes])


if __name__ == "__main__":
    main()
