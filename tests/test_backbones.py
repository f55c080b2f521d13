import pytest
import timm
import torch
from safetensors.torch import save_file

from twoview.backbones import create_backbone, is_depthwise
from twoview.errors import UserError


@pytest.mark.parametrize(
    ("name", "width"),
    # timm's num_features is 1024 for the mobilenet's features as well, but 288 is what some versions say.
    [("test_resnet", 96), ("test_vit", 64), ("mobilenetv3_small_050", 1024), ("convnext_atto", 320), ("resnet10", 512)],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_family_gives_one_vector_an_image(name, width, channels):
    network, num_features = create_backbone(name, in_chans=channels, image_size=32)
    assert num_features == width
    assert network.eval()(torch.zeros(2, channels, 32, 32)).shape == (2, width)


def positions(network, size):
    return tuple(network.eval().forward_features(torch.zeros(1, 3, size, size)).shape[-2:])


def test_small_images_get_a_small_stem():
    assert positions(create_backbone("resnet18", image_size=32)[0], 32) == (4, 4)
    assert positions(create_backbone("resnet10t", image_size=32)[0], 32) == (4, 4)
    assert positions(create_backbone("resnet18", image_size=32, stem="timm")[0], 32) == (1, 1)
    assert positions(create_backbone("resnet18", image_size=32, stem="small_stride2")[0], 32) == (2, 2)
    assert positions(create_backbone("resnet18", image_size=224)[0], 224) == (7, 7)


def test_resnet10_is_a_resnet18_with_one_block_a_stage_and_timm_alone_rebuilds_it():
    network, _ = create_backbone("resnet10", image_size=32)
    assert positions(network, 32) == (2, 2)
    assert network.build_arguments["name"] == "resnet18"
    rebuilt, _ = create_backbone(**network.build_arguments)
    rebuilt.load_state_dict(network.state_dict())


def test_transformers_are_built_for_the_image_size():
    network, _ = create_backbone("vit_tiny_patch16_224", image_size=32)
    assert network.patch_embed.grid_size == (8, 8)
    rebuilt, _ = create_backbone(**network.build_arguments)
    rebuilt.load_state_dict(network.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "test_vit", "convnext_atto"])
def test_features_repeat(name):
    network, _ = create_backbone(name, image_size=64)
    network.eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(network(x), network(x))


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"backbone.name=resnet19: .*resnet18"):
        create_backbone("resnet19")


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="data.image_size=8"):
        create_backbone("vgg11", image_size=8)


def test_stems_are_for_residual_networks():
    with pytest.raises(UserError, match="backbone.stem"):
        create_backbone("test_vit", stem="small")
    with pytest.raises(UserError, match="backbone.stem=tiny"):
        create_backbone("resnet18", stem="tiny")


def test_unknown_options_are_refused():
    with pytest.raises(UserError, match="backbone.options"):
        create_backbone("resnet18", options={"droppath": 0.1})


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=0).state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "method.backbone."])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested"])
def test_weights_of_a_file_are_loaded_whatever_their_prefix(tmp_path, weights, prefix, kind, caplog):
    caplog.set_level("INFO")
    tensors = {prefix + k: v for k, v in weights.items()}
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors} if kind == "nested" else tensors, file)
    network, _ = create_backbone("test_resnet", image_size=160, weights=file)
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())
    assert f"{len(weights)} of {len(weights)} tensors matched" in caplog.text


def test_weights_that_match_in_part_are_refused_unless_asked_for(tmp_path, weights):
    file = tmp_path / "w.pt"
    torch.save({k: v for k, v in weights.items() if "layer4" not in k}, file)
    with pytest.raises(UserError, match=r"tensors of the network matched \(missing: layer4"):
        create_backbone("test_resnet", image_size=160, weights=file)
    network, _ = create_backbone("test_resnet", image_size=160, weights=file, partial_weights=True)
    assert torch.equal(network.state_dict()["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])
    with pytest.raises(UserError, match="0 of"):
        create_backbone("test_vit", image_size=160, weights=file, partial_weights=True)


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_are_no_weights_are_refused_and_never_executed(tmp_path, capsys):
    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("harmful.pt", "text.pt", "text.safetensors", "missing.pt"):
        with pytest.raises(UserError, match=name):
            create_backbone("test_resnet", weights=tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_depthwise_networks_are_known():
    assert is_depthwise(timm.create_model("mobilenetv3_small_050"))
    assert is_depthwise(timm.create_model("convnext_atto"))
    assert not is_depthwise(timm.create_model("resnet18"))
    assert not is_depthwise(timm.create_model("test_vit"))
