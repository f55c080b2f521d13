"""Duplicates: planted copies are found by kind, other images are not, and no number of images needs all pairs."""

import csv
import os
from functools import partial

import numpy as np
import pytest
import torch
from hostile_runs import run
from PIL import Image, ImageOps

from twoview import load as load_encoder
from twoview.data import ImageData, TensorImages, digits, folder, read_groups
from twoview.data.headers import file_size
from twoview.errors import UserError
from twoview.tools import find_duplicates
from twoview.tools.duplicate_candidates import candidate_pairs, descriptor_matrices, thumbnails_of
from twoview.tools.duplicate_groups import Link, group
from twoview.tools.duplicate_pairs import _typical
from twoview.tools.image_sets import SIDE
from twoview.tools.registration import register

CPU = torch.device("cpu")
DEFAULT = ("re-encoded", "resized", "mirrored", "cropped")


def texture(seed, width=150, height=120):
    """An image of large and of small smooth spots."""
    rng, pixels = np.random.default_rng(seed), np.zeros((height, width, 3))
    for spots, share in ((5, 0.6), (30, 0.4)):
        small = Image.fromarray(rng.integers(0, 256, (spots, spots, 3), dtype=np.uint8))
        pixels += share * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.round().astype(np.uint8))


def copy_of(image, kind, seed=0):
    width, height = image.size
    if kind == "resized":
        return image.resize((width // 2, height // 2))
    if kind == "mirrored":
        return ImageOps.mirror(image)
    if kind == "cropped":
        left, top = (int(np.random.default_rng(seed).integers(0, side // 10)) for side in (width, height))
        return image.crop((left, top, left + round(0.9 * width), top + round(0.9 * height)))
    return image.convert("L") if kind == "recolored" else image


def plant(root, kinds, images=10):
    """Files NUMBER-original.png and NUMBER-KIND.jpg."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        image = texture(number)
        image.save(root / f"{number}-original.png")
        for kind in kinds:
            copy_of(image, kind, number).save(root / f"{number}-{kind}.jpg", quality=60)
    return root


def images_of(root, **changes):
    return partial(folder, root=str(root), **({"num_workers": 0, "cache": False} | changes))


def rows_of(run_dir):
    with open(run_dir / "duplicates.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def groups_of(run_dir):
    found = {}
    for row in rows_of(run_dir):
        found.setdefault(row["group"], set()).add(os.path.basename(row["path"]).rpartition(".")[0])
    return sorted(map(sorted, found.values()))


def in_memory(pixels):
    return ImageData(TensorImages(pixels, torch.full((len(pixels),), -1)), None, None, [])


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with copies of all kinds, the folder of a search with default kinds, and its report."""
    root = plant(tmp_path_factory.mktemp("planted") / "images", (*DEFAULT, "recolored"), 16)
    run_dir = root.parent / "run"
    return root, run_dir, find_duplicates(images_of(root), run_dir=run_dir)


def test_copies_are_in_the_group_of_their_image_and_nothing_else_is(searched):
    _, run_dir, report = searched
    expected = [sorted(f"{number}-{kind}" for kind in ("original", *DEFAULT)) for number in range(16)]
    assert groups_of(run_dir) == sorted(expected)
    assert (report["images"], report["groups"], report["grouped"]) == (96, 16, 80)
    closest = {os.path.basename(row["path"]): row for row in rows_of(run_dir)}
    assert {closest[f"{number}-re-encoded.jpg"]["kind"] for number in range(16)} <= {"re-encoded", "mirrored"}
    assert all(0 < float(row["distance"]) < 18 for row in closest.values())


def test_the_table_gives_the_groups_of_a_loss(searched):
    root, run_dir, _ = searched
    images = folder(str(root), num_workers=0, cache=False).pretrain
    groups = read_groups(run_dir / "duplicates.csv", images).tolist()
    numbers = {}
    for position, number in enumerate(groups):
        name = os.path.basename(images.name(position))
        numbers.setdefault(number, set()).add("no" if "recolored" in name else name.partition("-")[0])
    assert len(numbers) == 17
    assert numbers.pop(-1) == {"no"}
    assert all(len(names) == 1 for names in numbers.values())


def test_the_page_shows_every_group_and_needs_no_other_file(searched):
    page = (searched[1] / "duplicates.html").read_text()
    assert page.count("<h2>Group") == 16
    assert page.count('src="data:image/jpeg;base64,') == 80
    assert "http:" not in page
    assert "https:" not in page
    assert "80 of 96 images are in 16 groups" in page


@pytest.mark.parametrize("kind", [*DEFAULT, "recolored"])
def test_only_kinds_that_are_chosen_are_found(kind, searched, tmp_path):
    root = searched[0]
    some = tmp_path / "some.txt"
    some.write_text("\n".join(str(file) for file in sorted(root.iterdir()) if file.name[1] == "-"))
    find_duplicates(images_of(some), kinds=[kind], run_dir=tmp_path)
    rows = rows_of(tmp_path)
    assert {row["kind"] for row in rows} == {kind}
    found = {os.path.basename(row["path"]) for row in rows}
    assert {f"{number}-{kind}.jpg" for number in range(10)} <= found
    numbers = {}
    for row in rows:
        numbers.setdefault(row["group"], set()).add(os.path.basename(row["path"]).partition("-")[0])
    assert all(len(names) == 1 for names in numbers.values())


def test_between_two_sets_only_pairs_across_are_reported(tmp_path):
    first, second = plant(tmp_path / "first", ["re-encoded"], 6), tmp_path / "second"
    second.mkdir()
    copy_of(texture(2), "mirrored").save(second / "a.jpg")
    texture(3).save(second / "b.png")  # equal
    for name in ("c", "d"):
        texture(20).save(second / f"{name}.png")  # equal to each other, and to nothing in the first set
    report = find_duplicates(images_of(first), against=second, run_dir=tmp_path)
    expected = [["2-original", "2-re-encoded", "a"], ["3-original", "3-re-encoded", "b"]]
    assert groups_of(tmp_path) == expected
    assert report["pairs"]["equal"] == 1
    sides = {os.path.basename(row["path"]): row["set"] for row in rows_of(tmp_path)}
    assert (sides["a.jpg"], sides["2-original.png"]) == ("against", "data")


def test_ten_thousand_equal_images_are_one_group_without_candidates(tmp_path):
    image = torch.from_numpy(np.array(texture(0, 8, 8))).permute(2, 0, 1)
    report = find_duplicates(in_memory(image.expand(10_000, -1, -1, -1)), run_dir=tmp_path)
    assert (report["groups"], report["grouped"], report["candidates"]) == (1, 10_000, 0)
    assert report["pairs"] == {"equal": 9_999}
    assert len(rows_of(tmp_path)) == 10_000


def test_many_nearly_equal_images_need_few_pairs(tmp_path):
    image = torch.from_numpy(np.array(texture(0, 32, 32))).permute(2, 0, 1).float()
    noise = torch.randn(80, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    report = find_duplicates(in_memory((image + noise).clamp(0, 255).to(torch.uint8)), run_dir=tmp_path)
    assert (report["groups"], report["grouped"]) == (1, 80)
    assert report["candidates"] < 80 * 25


def test_blank_images_are_duplicates_only_if_they_are_equal(tmp_path):
    noise = torch.randint(250, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    white = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    report = find_duplicates(in_memory(torch.cat([noise, white])), run_dir=tmp_path)
    assert (report["blank"], report["groups"], report["grouped"]) == (9, 1, 3)
    assert [row["path"] for row in rows_of(tmp_path)] == ["image 6", "image 7", "image 8"]


@pytest.mark.parametrize("images", [0, 1])
def test_a_set_without_pairs_has_no_groups(images, tmp_path):
    pixels = torch.randint(0, 256, (images, 1, 16, 16), dtype=torch.uint8)
    report = find_duplicates(in_memory(pixels), run_dir=tmp_path)
    assert (report["images"], report["groups"]) == (images, 0)
    assert rows_of(tmp_path) == []


def test_images_of_the_test_split_are_searched_too(tmp_path):
    pixels = torch.stack([torch.from_numpy(np.array(texture(i, 32, 32))).permute(2, 0, 1) for i in range(6)])
    labels = torch.arange(6) % 2
    train_images, test_images = TensorImages(pixels[:4], labels[:4]), TensorImages(pixels[3:], labels[3:])
    find_duplicates(ImageData(train_images, train_images, test_images, ["a", "b"]), run_dir=tmp_path)
    assert [row["path"] for row in rows_of(tmp_path)] == ["image 3", "test image 0"]


def test_registration_finds_the_window_of_a_crop():
    whole = texture(1, 320, 320).convert("L")
    left, top, width, height = 24, 8, 272, 296
    views = [whole, whole.crop((left, top, left + width, top + height))]
    small = [torch.from_numpy(np.array(view.resize((SIDE, SIDE)))).float()[None] for view in views]
    small[1] = 0.8 * small[1] + 20  # another contrast and brightness
    window = register(*small, torch.tensor([[0.92, 0.92, 0.0, 0.0]]))[0]
    # The window's center and extent in pixels, from -1 to 1 over the image.
    expected = [width / 320, height / 320, (2 * left + width) / 320 - 1, (2 * top + height) / 320 - 1]
    torch.testing.assert_close(window, torch.tensor(expected), rtol=0, atol=0.01)


def test_descriptors_of_the_whole_image_are_its_pixels():
    gray = torch.randint(0, 256, (5, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (matrix,) = descriptor_matrices(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    blocks = gray.float().view(5, 8, 8, 8, 8).mean((2, 4)).flatten(1)
    torch.testing.assert_close(thumbnails_of(gray) @ matrix, blocks - blocks.mean(1, keepdim=True), rtol=0, atol=1e-3)


def test_the_typical_difference_is_the_lower_median_of_the_pairs_of_an_image():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(0, 9, (40, 2), generator=generator)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    distance = torch.rand(len(pairs), generator=generator)
    expected = []
    for pair in pairs.tolist():
        own = [sorted(distance[(pairs == image).any(1)].tolist()) for image in pair]
        expected.append(min(values[(len(values) - 1) // 2] for values in own))
    torch.testing.assert_close(_typical(pairs, distance), torch.tensor(expected))


def test_features_select_pairs_that_pixels_do_not():
    thumbnails = torch.rand(60, 256, generator=torch.Generator().manual_seed(0))
    features = torch.eye(60)
    features[50] = features[3]
    found = [
        {tuple(pair) for pair in candidate_pairs(thumbnails, torch.arange(60), None, False, False, f, CPU).tolist()}
        for f in (None, features)
    ]
    assert (3, 50) in found[1] - found[0]
    assert found[0] < found[1]


def test_a_chain_of_pairs_is_one_group_whatever_their_order():
    links = [Link(i, i + 1, "resized", 1.0 + i) for i in range(50) if i != 20]
    expected = [list(range(21)), list(range(21, 51))]
    for order in (links, links[::-1], links[::2] + links[1::2]):
        assert [[member.position for member in found] for found in group(order)] == expected


def test_mistakes_are_one_sentence_before_any_image_is_read(tmp_path):
    with pytest.raises(UserError, match=r"kinds=\['rotated'\]: give a list of one or more of re-encoded"):
        find_duplicates(digits, kinds=["rotated"])
    with pytest.raises(UserError, match="kinds=cropped: give a list"):
        find_duplicates(digits, kinds="cropped")
    with pytest.raises(UserError, match="against=elsewhere: goes with images that have data.root"):
        find_duplicates(digits, against="elsewhere", run_dir=tmp_path)
    with pytest.raises(UserError, match="against=.*: there is no such folder"):
        find_duplicates(images_of(tmp_path), against=tmp_path / "none", run_dir=tmp_path)


def test_the_size_of_a_file_is_read_from_its_header(tmp_path):
    texture(0, 40, 30).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    os.mkfifo(tmp_path / "c.png")
    assert [file_size(tmp_path / f"{name}.png") for name in "abcd"] == [(30, 40), None, None, None]


def test_the_command_line_with_a_checkpoint_and_unusual_names(tmp_path):
    root = plant(tmp_path / "my pictures, München", ["mirrored"], 4)
    (root / "0-mirrored.jpg").rename(root / "<b>ä'1.jpg")
    arguments = ["task=duplicates", "data=folder", f"data.root={root}", "data.num_workers=0", "data.cache=false"]
    done = run(tmp_path, *arguments, "checkpoint=random:test_resnet", "hydra.run.dir=run", limit=60)
    assert done.code == 0, done.err
    assert "8 of 8 images are in 4 groups" in " ".join(done.out.split())
    (row,) = [row for row in rows_of(tmp_path / "run") if "<b>" in row["path"]]
    assert row["path"] == str(root / "<b>ä'1.jpg")
    page = (tmp_path / "run" / "duplicates.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;ä" in page


def test_features_of_an_encoder_are_used(tmp_path):
    root = plant(tmp_path / "images", ["resized"], 3)
    encoder = load_encoder("random:test_resnet", image_size=32)
    report = find_duplicates(images_of(root), encoder, run_dir=tmp_path)
    assert (report["groups"], report["grouped"]) == (3, 6)
