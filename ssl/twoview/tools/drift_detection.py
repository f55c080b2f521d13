"""Drift: whether the images of a set are distributed as those of a reference, by two-sample tests on embeddings."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from twoview.evaluation.progress import part, shown_by
from twoview.evaluation.two_sample import TESTS, Comparison, Pool, compare_sets, false_alarms, share_interval
from twoview.files import write_atomically
from twoview.reporting.drift import write_page
from twoview.reporting.progress_bar import EvaluationBar
from twoview.tools.drift_facts import changed_clusters, changed_images, set_figures
from twoview.tools.drift_sets import Sample, Vectors, check_memory, read_pair, sample
from twoview.tools.drift_settings import DriftSettings

log = logging.getLogger(__name__)

DRIFT = 3  # exit code of the command line if there is drift


def drift(
    reference: Vectors,
    current: Vectors,
    settings: DriftSettings = DriftSettings(),  # noqa: B008 (frozen)
    seed: int = 0,
    run_dir: str | Path = "run",
    to: str | Path | None = None,
) -> dict[str, Any]:
    """Compare embeddings of current images with those of a reference, and write ``drift.json`` and ``drift.html``.

    Three tests by permutation are combined by Holm's method: the maximum mean discrepancy, a classifier two-sample
    test, and the shares of clusters, see :mod:`twoview.evaluation.two_sample`. If all images are independent samples of
    one distribution, the probability of a false alarm is at most ``settings.level``.

    Args:
        reference: Parquet file of :func:`twoview.tools.embed`, the :class:`Embeddings` of such a file, or floating
            point vectors ``[N, D]``; at least 20 images.
        current: the images that may have changed, embedded by the same network.
        settings: level, number of permutations, sizes.
        seed: seed of samples, permutations, splits and clusters; the same input and seed give the same report on the
            same machine.
        run_dir: folder of the report; created if missing.
        to: another folder of the report; None for ``run_dir``.

    Returns:
        The content of ``drift.json``:

        * ``drift``: whether any test rejects; ``exit_code``: 3 if so, else 0;
        * ``tests``: for "mmd", "classifier" and "clusters" the ``statistic`` (squared MMD; AUC in [0, 1]; chi-square),
          the p value ``p`` and the ``adjusted_p`` value, which is compared with the level;
        * ``false_alarms``: number of ``alarms`` on random ``splits`` of the reference into halves of ``images`` images,
          and the 95 % ``interval`` of their rate; None for ``splits=0``;
        * ``changed``: for "current" and "reference" the images around which this set has more images than the other
          one, by the kernel witness function;
        * ``clusters``: share of the images of each set in each cluster, largest change first;
        * ``sets``: for each set its ``images``, how many were ``compared``, ``effective_rank``, ``uniformity`` and
          ``retrieval`` (None without labels in both sets), on equal numbers of images;
        * ``settings``, ``seed``, ``bandwidth`` of the kernel, ``checkpoint``, and ``files``.

    Raises:
        UserError: if a set cannot be read, has too few images, or the sets are of different networks.

    Example:
        >>> vectors = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
        >>> drift(vectors[:100], vectors[100:200], DriftSettings(splits=0), run_dir=folder)["drift"]
        False
        >>> drift(vectors[:100], vectors[200:] + 0.5, DriftSettings(splits=0), run_dir=folder)["exit_code"]
        3
    """
    folder = Path(str(run_dir if to is None else to)).expanduser()
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is reported before the work
    pair = read_pair(reference, current)
    check_memory((len(pair[0].vectors), len(pair[1].vectors)), pair[0].vectors.shape[1], settings.max_images)
    generator = np.random.default_rng(seed)
    first, second = (sample(content, settings.max_images, generator) for content in pair)
    with shown_by(EvaluationBar()):
        with part("two-sample tests"):
            found = compare_sets(first.vectors, second.vectors, settings.clusters, settings.permutations, generator)
        report = _decision(found, settings, seed)
        if settings.splits:
            with part("false alarms on splits of the reference"):
                report["false_alarms"] = _calibrate(first, settings, generator)
        with part("changed images and clusters"):
            report["changed"] = changed_images(first, second, found.pool.bandwidth, settings.listed)
            report["clusters"] = changed_clusters(first, second, found.pool, found.order)
            report["sets"] = set_figures(first, second)
    report["checkpoint"] = first.content.metadata.get("checkpoint") or second.content.metadata.get("checkpoint")
    report["files"] = [str(x) if isinstance(x, str | Path) else None for x in (reference, current)]
    write_atomically(folder / "drift.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    page = write_page(report, (first.vectors, second.vectors), folder)
    tests = ", ".join(f"{name} {test['adjusted_p']:.3g}" for name, test in report["tests"].items())
    log.info("%s: adjusted p values %s; see %s", "drift" if report["drift"] else "no drift found", tests, page)
    return report


def _decision(found: Comparison, settings: DriftSettings, seed: int) -> dict[str, Any]:
    columns = zip(TESTS, found.statistics.tolist(), found.p.tolist(), found.adjusted_p.tolist(), strict=True)
    reject = bool(found.adjusted_p.min() <= settings.level)
    return {
        "drift": reject,
        "exit_code": DRIFT if reject else 0,
        "tests": {name: {"statistic": value, "p": p, "adjusted_p": both} for name, value, p, both in columns},
        "false_alarms": None,
        "bandwidth": found.pool.bandwidth,
        "settings": vars(settings).copy(),
        "seed": seed,
    }


def _calibrate(first: Sample, settings: DriftSettings, generator: np.random.Generator) -> dict[str, Any]:
    pool = Pool.of(first.vectors, settings.clusters, int(generator.integers(2**31)))
    alarms = false_alarms(pool, settings.splits, settings.level, settings.permutations, generator)
    interval = share_interval(alarms, settings.splits)
    return {"alarms": alarms, "splits": settings.splits, "interval": interval, "images": len(first.rows) // 2}
