"""Evaluation with a progress bar, whose report is written even if it is interrupted."""

from pathlib import Path
from typing import Any

from twoview.augment import TwoViews
from twoview.data import ImageData
from twoview.encoder import Encoder
from twoview.errors import Interrupted, continue_with
from twoview.evaluation.evaluate import evaluate
from twoview.evaluation.progress import shown_by
from twoview.evaluation.settings import EvaluationSettings
from twoview.reporting import files, pages, record
from twoview.reporting.progress_bar import EvaluationBar

EXIT_CODE = 130  # of a process after Ctrl-C


def evaluate_and_write(
    report: dict[str, Any], encoder: Encoder, images: ImageData, views: TwoViews, settings: EvaluationSettings
) -> dict[str, Any]:
    """Evaluate a network, and write the report and the files beside it.

    Args:
        report: entries of the report that are known before; ``task``, ``seed`` and ``run_dir`` are used. Pages are
            written for the task "evaluate" only.
        encoder: the network, on the device of the computation.
        images: labeled training and test images.
        views: augmentation for which alignment is measured.
        settings: measures, and how choices are made.

    Returns:
        The content of ``report.json``.

    Raises:
        Interrupted: after Ctrl-C. The report with the finished parts and ``incomplete`` has been written.
        KeyboardInterrupt: at Ctrl-C before there is anything to report.
        UserError: see :func:`twoview.evaluation.evaluate.evaluate`.
    """
    run_dir, task = Path(report["run_dir"]), report["task"]
    advice = continue_with(run_dir) if task == "pretrain" else "repeat the command to complete it"
    try:
        with shown_by(EvaluationBar()):
            found, evidence = evaluate(encoder, images, views, settings, report["seed"])
    except KeyboardInterrupt as stop:
        if task != "pretrain":
            raise
        record.write(report | {"incomplete": True}, run_dir)
        raise Interrupted(f"SIGINT: no part of the evaluation is finished; {advice}", EXIT_CODE) from stop
    files.write_evidence(evidence, images, run_dir)
    report = record.write(report | found, run_dir)
    if task == "evaluate":
        pages.write_pages(report, evidence, images, views, run_dir)
    if "incomplete" in report:
        raise Interrupted(f"SIGINT: the finished parts are in {run_dir / 'report.json'}; {advice}", EXIT_CODE)
    return report
