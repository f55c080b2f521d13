"""``duplicates.csv`` and ``duplicates.html``: the groups that a search for duplicates has found."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twoview.evaluation.progress import part
from twoview.files import write_csv
from twoview.reporting.duplicates import Group, shown, write_page
from twoview.tools.duplicate_groups import Member
from twoview.tools.image_sets import ImageSets

log = logging.getLogger(__name__)

COLUMNS = ["path", "group", "kind", "distance", "closest", "set"]
SHOWN_GROUPS, SHOWN_IMAGES = 200, 12  # on the page: groups, and images of a group


def write_groups(sets: ImageSets, groups: Sequence[Sequence[Member]], report: Mapping[str, Any], run_dir: Path) -> None:
    """Write the groups as a table and as a page.

    Args:
        sets: the images that were searched.
        groups: groups of duplicates.
        report: numbers of :func:`twoview.tools.find_duplicates`.
        run_dir: target folder.
    """
    write_csv(run_dir / "duplicates.csv", [COLUMNS, *_rows(sets, groups)])
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(report["pairs"].items()))
    summary = [
        f"{report['grouped']:,} of {report['images']:,} images are in {report['groups']:,} groups;"
        f" pairs: {kinds or 'none'}.",
        f"{report['candidates']:,} candidate pairs were verified. {report['blank']:,} images of nearly one gray level "
        "were compared by equality only. No file was changed.",
    ]
    if len(groups) > SHOWN_GROUPS:
        summary.append(f"The first {SHOWN_GROUPS} groups are shown; duplicates.csv has all of them.")
    with part("page of groups"):
        page = write_page("Duplicates", summary, _shown(sets, groups), run_dir)
    log.info("duplicates: %s The groups are in %s", summary[0], page)


def _rows(sets: ImageSets, groups: Sequence[Sequence[Member]]) -> Iterator[list[Any]]:
    for number, members in enumerate(groups, 1):
        for position, closest, kind, distance in members:
            names = [_path(sets.name(place)) for place in (position, closest)]
            place = "data" if position < sets.border else "against"
            yield [names[0], number, kind, f"{distance:.1f}", names[1], place]


def _path(name: str) -> str:
    """Absolute path of a file, which does not depend on where the table is read; other names are unchanged."""
    return os.path.abspath(name) if os.path.isfile(name) else name


def _shown(sets: ImageSets, groups: Sequence[Sequence[Member]]) -> Iterator[Group]:
    for number, members in enumerate(groups[:SHOWN_GROUPS], 1):
        images = [
            shown(sets.image(member.position), sets.name(member.position), f"{member.kind}, {member.distance:.1f}")
            for member in members[:SHOWN_IMAGES]
        ]
        yield Group(number, len(members), images)
