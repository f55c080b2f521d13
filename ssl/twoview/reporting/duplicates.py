"""``duplicates.html``: groups of duplicates with small images, in one self-contained file."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from twoview.files import write_atomically
from twoview.reporting import figures
from twoview.reporting.pages import environment

THUMBNAIL = 160  # largest height and width in pixels


class Shown(NamedTuple):
    """An image of a group: data URI, name, and how it was found."""

    source: str
    name: str
    note: str


class Group(NamedTuple):
    """A group of duplicates: its number, how many images it has, and those that are shown."""

    number: int
    size: int
    images: Sequence[Shown]


def shown(pixels: Tensor, name: str, note: str) -> Shown:
    """Reduce an image uint8 ``[C, h, w]`` for the page."""
    image = figures.as_image(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return Shown(figures.jpeg(image), name, note)


def write_page(title: str, summary: Sequence[str], groups: Iterable[Group], run_dir: Path) -> Path:
    """Write ``duplicates.html``.

    Args:
        title: title of the page.
        summary: lines above the groups.
        groups: the groups that are shown.
        run_dir: target folder.

    Returns:
        Path of the page.
    """
    path, template = run_dir / "duplicates.html", environment().get_template("duplicates.html.j2")
    write_atomically(path, template.render(title=title, summary=summary, groups=groups))
    return path
