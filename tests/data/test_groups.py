"""Groups of images from a file, which are not negatives of each other."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from data.image_files import load, make_folder
from short_runs import CPU, losses, pretrain, short_data
from small_methods import make, views

from twoview.data import read_groups
from twoview.errors import UserError
from twoview.losses import info_nce, nt_xent
from twoview.methods import MoCo, SimCLR

IDS = torch.arange(8)
GROUPS = torch.tensor([2, -1, 2, 0, 0, -1, 1, 2])


def write(file, rows, header="path,group"):
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def test_paths_are_relative_to_the_file(tmp_path):
    images = load(make_folder(tmp_path / "ä images")).pretrain
    names = [images.name(i).rpartition("ä images/")[2] for i in range(len(images))]
    rows = [f"ä images/{names[0]},x", f"ä images/{names[2]},x", f"ä images/{names[5]},y", "elsewhere.png,y"]
    rows += [f"ä images/{names[6]},"]  # in no group
    groups = read_groups(write(tmp_path / "groups.csv", rows), images)
    assert {i: group for i, group in enumerate(groups.tolist()) if group >= 0} == {0: 0, 2: 0, 5: 1}


def test_images_without_files_are_named(tmp_path):
    images = short_data().pretrain
    groups = read_groups(write(tmp_path / "groups.csv", ["image 3,a", "image 7,a"]), images)
    assert groups[[3, 7]].tolist() == [0, 0]
    assert (groups >= 0).sum() == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such .csv file"),
        ("path,class\na.png,1\n", "the column group is missing or empty"),
        ("group\n1\n", "must name the columns: path, and group"),
        ("path,group\nnowhere.png,1\n", "names none of the"),
        ("", "must name the columns"),
    ],
)
def test_files_without_groups_are_refused(tmp_path, content, message):
    file = tmp_path / "groups.csv"
    if content is not None:
        file.write_text(content)
    images = load(make_folder(tmp_path / "images")).pretrain
    with pytest.raises(UserError, match=message) as error:
        read_groups(file, images)
    assert f"method.group_file={file}" in str(error.value)


def test_images_of_a_group_are_not_negatives_of_each_other():
    simclr = make(SimCLR, temperature=0.3, same="groups", group_file="groups.csv")
    assert not simclr.uses_labels
    encoded = simclr.encode(*views())
    assert torch.equal(simclr.loss(encoded, labels=GROUPS).loss, nt_xent(*encoded.embeddings, 0.3, same=GROUPS))
    moco = make(MoCo, temperature=0.3, same="groups", group_file="groups.csv", queue_size=24)
    first = moco(*views(), ids=IDS, labels=GROUPS)
    moco.after_batch(first)
    encoded = moco.encode(*views())
    step = moco.loss(encoded, IDS + 100, GROUPS)
    queue, _ = moco.queue.read()
    mask = (GROUPS[:, None] == GROUPS) & (GROUPS >= 0)[:, None]
    expected = info_nce(encoded.embeddings[0], encoded.targets[0], queue, 0.3, same=mask)
    torch.testing.assert_close(step.loss, expected)
    assert step.logs["queue_masked"].item() == pytest.approx(mask.float().mean().item())


def test_a_run_uses_the_groups_of_a_file(tmp_path):
    file = write(tmp_path / "groups.csv", [f"image {i},{i % 3}" for i in range(1347)])
    short = {"trainer": replace(CPU, max_epochs=None, max_steps=3), "settings": None}
    pretrain(tmp_path / "plain", method=partial(SimCLR, temperature=0.2), **short)
    pretrain(tmp_path / "run", method=partial(SimCLR, temperature=0.2, same="groups", group_file=str(file)), **short)
    plain, grouped = (float(losses(tmp_path / name)[0]) for name in ("plain", "run"))
    assert grouped < plain  # a third of the negatives is left out


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"same": "groups"}, "method.same=groups: needs method.group_file=FILE.csv"),
        ({"group_file": "a.csv"}, "method.group_file=a.csv: has no effect with method.same=none"),
        ({"same": "class"}, "method.same=class"),
    ],
)
@pytest.mark.parametrize("method", [SimCLR, MoCo])
def test_knobs_that_do_not_fit_are_refused(method, knobs, message):
    with pytest.raises(UserError, match=message):
        make(method, **knobs)
