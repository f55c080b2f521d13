"""Loading of encoders from any source, and their features."""

from dataclasses import FrozenInstanceError, asdict

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import SIZE, short_data
from torch import nn

import twoview
from twoview.backbones import at_random, build_arguments, create_backbone
from twoview.data import LazyImages, TensorImages
from twoview.encoder import Encoder, ModelCard
from twoview.errors import UserError
from twoview.loading import read_checkpoint

CARD = ModelCard("test", {"name": "test_resnet"}, 8, 1, mean=(0.5,), std=(0.25,))


@pytest.fixture(scope="module")
def encoder(finished):
    return twoview.load(finished.folder)


@pytest.fixture
def content(finished):
    """A checkpoint, to be damaged."""
    return torch.load(finished.folder / "checkpoints" / "last.ckpt", weights_only=True)


def saved(content, folder):
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def test_a_checkpoint_is_plain_and_loads_in_one_line(finished, content, encoder):
    assert content["twoview"]["mean"] == pytest.approx(tuple(short_data().mean_std[0]))
    assert not encoder.network.training
    assert encoder.width == 96
    assert encoder(short_data().test.pixels[:3]).shape == (3, 96)
    assert encoder(Image.new("RGB", (50, 50))).shape == (1, 96)
    assert encoder([Image.new("RGB", (50, 50)), Image.new("L", (20, 30))]).shape == (2, 96)
    assert encoder.source == str(finished.folder / "checkpoints" / "last.ckpt")
    card = encoder.card
    assert (card.method, card.data, card.seed, card.classes) == ("SimCLR", "digits", 0, tuple("0123456789"))
    assert (card.image_size, card.channels, card.store_size, card.resize_size) == (SIZE, 1, None, SIZE)
    assert {"twoview", "python", "torch", "timm"} <= card.versions.keys()
    with pytest.raises(FrozenInstanceError):
        card.method = "another"


def test_a_folder_a_checkpoint_folder_and_a_file_are_the_same(finished, encoder):
    pixels = short_data().test.pixels[:5]
    for source in ("checkpoints", "checkpoints/last.ckpt"):
        assert torch.equal(twoview.load(finished.folder / source)(pixels), encoder(pixels))


def old_layout(content):
    """The same checkpoint as it was written before there were model cards: lists, ``small_patches``, one size."""
    card = content["twoview"]
    card["store_size"] = card.pop("resize_size")
    card["backbone"] = {**card["backbone"], "small_patches": True}
    for name in ("mean", "std", "classes"):
        card[name] = list(card[name])
    return content


def test_an_old_checkpoint_gives_the_same_features(finished, content, encoder, tmp_path):
    before = twoview.load(saved(old_layout(content), tmp_path))
    assert before.card == encoder.card
    assert "small_patches" not in before.card.backbone
    pixels = short_data().test.pixels[:20]
    assert torch.equal(before(pixels), encoder(pixels))
    pixel_values = before.preprocess(pixels)
    assert torch.equal(
        before.at_random(3).apply_network(pixel_values), encoder.at_random(3).apply_network(pixel_values)
    )


def test_a_transformer_of_an_old_checkpoint_keeps_its_small_patches(tmp_path):
    size = 16
    network, _ = create_backbone("test_vit", 1, size)
    card = {
        **asdict(ModelCard("MoCoV3", build_arguments(network), size, 1, size, data="digits")),
        "mean": [0.3],
        "std": [0.4],
        "classes": ["0", "1"],
        "versions": {"timm": "1.0.31"},
        "length": {"max_epochs": 60},
        "conditions": {},
        "total_steps": 10.0,
        "batches_without_step": 0,
        "skipped": 0,
    }
    del card["resize_size"]
    assert card["backbone"]["options"] == {"patch_size": 2}
    card["backbone"] = {**card["backbone"], "small_patches": True}
    weights = {f"method.backbone.{name}": value for name, value in network.state_dict().items()}
    path = saved({"twoview": card, "state_dict": {**weights, "method.head.0.weight": torch.zeros(2)}}, tmp_path)
    encoder = twoview.load(path)
    pixels = short_data(size).test.pixels[:4]
    with torch.no_grad():
        # Not equal bit for bit on every processor, since the encoder stores images with their channels last.
        torch.testing.assert_close(encoder(pixels), network.eval()(encoder.preprocess(pixels)))


@pytest.mark.parametrize("name", ["method", "backbone", "image_size", "channels", "mean", "std"])
def test_a_card_without_a_value_is_refused(content, tmp_path, name):
    del content["twoview"][name]
    with pytest.raises(UserError, match=r"checkpoint=.*changed.ckpt: its model card is damaged \(.*give another"):
        twoview.load(saved(content, tmp_path))


WRONG = [
    ("method", 5),
    ("backbone", "test_resnet"),
    ("backbone", None),
    ("backbone", {}),
    ("backbone", {"name": 5}),
    ("image_size", "16"),
    ("image_size", 16.0),
    ("image_size", 0),
    ("image_size", None),
    ("channels", -1),
    ("channels", 3),
    ("store_size", "16"),
    ("resize_size", "16"),
    ("resize_size", SIZE - 1),
    ("mean", None),
    ("mean", 0.5),
    ("mean", ["dark"]),
    ("mean", [0.5, 0.5]),
    ("std", []),
    ("std", [0.1, 0.1]),
    ("std", "wide"),
    ("data", 7),
    ("classes", 10),
    ("seed", "zero"),
    ("versions", None),
    ("versions", ["timm"]),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value}" for name, value in WRONG])
def test_a_card_with_a_value_of_another_type_is_refused(content, tmp_path, name, value):
    content["twoview"][name] = value
    with pytest.raises(UserError, match=r"checkpoint=.*changed.ckpt: its model card is damaged \(.*give another"):
        twoview.load(saved(content, tmp_path))


@pytest.mark.parametrize("changes", [{"unknown": 1}, {"in_chans": "1"}, {"name": "no_such_network"}])
def test_a_backbone_that_cannot_be_built_is_refused(content, tmp_path, changes):
    content["twoview"]["backbone"] |= changes
    with pytest.raises(UserError):
        twoview.load(saved(content, tmp_path))


def test_values_of_other_versions_are_ignored(content, encoder, tmp_path):
    content["twoview"] |= {"path": "/somewhere/else.ckpt", "from_the_future": [1]}
    assert twoview.load(saved(content, tmp_path)).card == encoder.card


@pytest.mark.parametrize("broken", ["none", "list", "values"])
def test_a_checkpoint_without_weights_is_refused(content, tmp_path, broken):
    if broken == "none":
        del content["state_dict"]
    else:
        content["state_dict"] = [1] if broken == "list" else dict.fromkeys(content["state_dict"], "weights")
    with pytest.raises(UserError, match="checkpoint=.*changed.ckpt"):
        twoview.load(saved(content, tmp_path))


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_what_is_no_checkpoint_is_refused_and_never_executed(tmp_path, capsys):
    torch.save({"twoview": Harmful()}, tmp_path / "harmful.ckpt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.ckpt")
    torch.save({"twoview": ["a card"]}, tmp_path / "list.ckpt")
    torch.save([1, 2], tmp_path / "sequence.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty").mkdir()
    names = ("harmful.ckpt", "foreign.ckpt", "list.ckpt", "sequence.ckpt", "text.ckpt", "missing.ckpt", "empty")
    for name in names:
        with pytest.raises(UserError, match=f"checkpoint=.*{name}"):
            twoview.load(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(finished, tmp_path, share):
    whole = (finished.folder / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"cut.ckpt: cannot be read"):
        read_checkpoint(tmp_path / "cut.ckpt")


def test_weights_of_another_architecture_are_refused(content, tmp_path):
    content["twoview"]["backbone"] |= {"name": "test_vit", "stem": "auto"}
    with pytest.raises(
        UserError, match=r"changed.ckpt: its weights do not fit this timm's test_vit .*use the timm of the run, 1\."
    ):
        twoview.load(saved(content, tmp_path))


@pytest.mark.parametrize("name", ["pvt_v2_b0", "xcit_nano_12_p16_224", "vit_tiny_patch16_224"])
def test_any_network_is_rebuilt_from_its_checkpoint(name):
    network, _ = create_backbone(name, in_chans=1, image_size=32)
    rebuilt = at_random(build_arguments(network), seed=0)
    rebuilt.load_state_dict(network.state_dict())


def test_a_random_network_is_a_function_of_the_seed():
    one, again, other = (twoview.load("random:test_resnet", 16, 1, seed=seed) for seed in (0, 0, 1))
    pixels = short_data().test.pixels[:3]
    assert torch.equal(one(pixels), again(pixels))
    assert not torch.equal(one(pixels), other(pixels))
    assert (one.card.method, one.card.mean, one.card.store_size) == ("random test_resnet", None, None)
    with pytest.raises(UserError, match="give data.image_size=N"):
        twoview.load("random:test_resnet")
    with pytest.raises(UserError, match="weights=w.pt: goes with checkpoint=timm:NAME"):
        twoview.load("random:test_resnet", 16, weights="w.pt")


def test_weights_of_a_file_stand_for_the_published_ones(tmp_path):
    network, _ = create_backbone("test_vit", 3, 32, stem="timm")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    encoder = twoview.load("timm:test_vit", 32, weights=tmp_path / "weights.pt")
    assert (encoder.card.method, encoder.card.channels) == ("timm test_vit", 3)
    assert encoder.source == str(tmp_path / "weights.pt")
    for name, value in network.state_dict().items():
        assert torch.equal(encoder.network.state_dict()[name], value)
    gray = twoview.load("random:test_vit", 32, channels=1)
    assert gray.card.channels == 1


class Files(list):
    """Images that are decoded on access; counts how many were."""

    read = 0

    def __getitem__(self, position):
        self.read += 1
        return super().__getitem__(position)


def photos(n):
    pixels = torch.randint(0, 256, (n, 3, 20, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


def test_features_are_streamed_and_equal_the_matrix(encoder):
    images = short_data().test.subset(torch.arange(50))
    batches = encoder.features(images, batch_size=16)
    assert iter(batches) is batches
    parts = list(batches)
    assert [len(part) for part in parts] == [16, 16, 16, 2]
    assert all(part.dtype == torch.float32 and part.device.type == "cpu" and not part.requires_grad for part in parts)
    assert torch.equal(torch.cat(parts), encoder.feature_matrix(images, batch_size=16))
    torch.testing.assert_close(encoder.feature_matrix(images), encoder(images.pixels))


def test_unlabelled_images_have_the_same_features(encoder):
    images = short_data().test.subset(torch.arange(20))
    unlabelled = images.with_labels(torch.full((20,), -1))
    expected = encoder.feature_matrix(images)
    assert torch.equal(encoder.feature_matrix(unlabelled), expected)
    torch.testing.assert_close(encoder.feature_matrix(list(images.pixels)), expected)
    torch.testing.assert_close(encoder.feature_matrix(image for image in images.pixels), expected)
    as_pil = (Image.fromarray(np.asarray(image[0])) for image in images.pixels)
    torch.testing.assert_close(encoder.feature_matrix(as_pil), expected)


def test_streaming_reads_one_batch_at_a_time():
    encoder = twoview.load("random:test_resnet", 16)
    for files in (Files(photos(40)), Files(photos(40))):
        lazy = LazyImages(files, torch.full((40,), -1), 16, 3)
        batches = encoder.features(lazy, batch_size=4)
        assert files.read == 0
        next(batches)
        assert files.read <= 8  # a batch, and at most one that is read ahead
        batches.close()
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield torch.zeros(3, 16, 16, dtype=torch.uint8)

    batches = encoder.features(endless(), batch_size=4)
    assert next(batches).shape == (4, 96)
    assert len(taken) == 4
    next(batches)
    assert len(taken) == 8


def test_lazy_images_have_the_features_of_decoded_ones():
    encoder = twoview.load("random:test_resnet", 16)
    lazy = LazyImages(photos(10), torch.arange(10) % 2, 16, 3)
    batch = lazy[range(10)]
    decoded = TensorImages(batch.pixels, lazy.labels, sizes=batch.sizes)
    assert torch.equal(encoder.feature_matrix(lazy, 4), encoder.feature_matrix(decoded, 4))


def test_an_encoder_takes_uint8_only_and_no_gradient(encoder):
    with pytest.raises(TypeError):
        encoder(torch.rand(2, 1, 16, 16))
    assert not encoder(short_data().test.pixels[:2]).requires_grad


def test_evaluation_mode_is_restored_for_every_module():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.9))
    network.train()
    network[1].eval()
    encoder = Encoder(network, CARD)
    pixels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(encoder(pixels), encoder(pixels))
    assert [module.training for module in network] == [True, False, True]
    assert int(network[1].num_batches_tracked) == 0

    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    failing = Encoder(Fails().train(), CARD)
    with pytest.raises(RuntimeError, match="no"):
        failing(pixels)
    assert failing.network.training


def test_changed_facts_keep_the_network_and_another_seed_changes_it(encoder):
    darker = encoder.with_card(mean=(0.1,))
    assert darker.network is encoder.network
    assert (darker.card.mean, darker.card.std) == ((0.1,), encoder.card.std)
    random = encoder.at_random(0)
    assert random.card.method == "random initialization"
    assert (random.card.mean, random.card.backbone) == (encoder.card.mean, encoder.card.backbone)
    pixels = short_data().test.pixels[:2]
    assert torch.equal(random(pixels), encoder.at_random(0)(pixels))
    assert not torch.equal(random(pixels), encoder.at_random(1)(pixels))
