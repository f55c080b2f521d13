import inspect
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from twoview.backbones import at_random, build_arguments, create_backbone, is_depthwise
from twoview.errors import UserError


@pytest.mark.parametrize(
    ("name", "width"),
    # num_features of the mobilenet is 288 in some versions of timm.
    [("test_resnet", 96), ("test_vit", 64), ("mobilenetv3_small_050", 1024), ("convnext_atto", 320), ("resnet10", 512)],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_networks_of_all_families_return_one_vector_per_image(name, width, channels):
    network, num_features = create_backbone(name, in_chans=channels, image_size=32)
    assert num_features == width
    assert network.eval()(torch.zeros(2, channels, 32, 32)).shape == (2, width)


def positions(network, size):
    return tuple(network.eval().forward_features(torch.zeros(1, 3, size, size)).shape[-2:])


def test_stem_auto_adapts_resnets_to_small_images():
    assert positions(create_backbone("resnet18", image_size=32)[0], 32) == (4, 4)
    assert positions(create_backbone("resnet10t", image_size=32)[0], 32) == (4, 4)
    assert positions(create_backbone("resnet18", image_size=32, stem="timm")[0], 32) == (1, 1)
    assert positions(create_backbone("resnet18", image_size=32, stem="small_stride2")[0], 32) == (2, 2)
    assert positions(create_backbone("resnet18", image_size=224)[0], 224) == (7, 7)


def test_resnet10_is_recorded_as_a_resnet18_of_timm():
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
    published, _ = create_backbone("vit_tiny_patch16_224", image_size=32, stem="timm")
    assert published.patch_embed.grid_size == (2, 2)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("stem", ["auto", "timm"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "resnet10_narrow"])
def test_build_arguments_create_the_same_architecture(name, stem, loaded, tmp_path):
    torch.save(create_backbone(name, image_size=32, stem="timm")[0].state_dict(), tmp_path / "w.pt")
    network, _ = create_backbone(name, image_size=32, stem=stem, weights=tmp_path / "w.pt" if loaded else None)
    arguments = build_arguments(network)
    rebuilt = at_random(arguments, seed=0)
    assert str(rebuilt) == str(network)
    assert build_arguments(rebuilt) == arguments
    rebuilt.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(rebuilt.eval()(x), network.eval()(x))


def test_defaults_equal_the_config():
    config = OmegaConf.load(Path(__file__).parents[1] / "conf" / "backbone" / "timm.yaml")
    defaults = {name: p.default for name, p in inspect.signature(create_backbone).parameters.items()}
    sizes = ("in_chans", "image_size")  # of the data
    assert config.keys() - {"_target_", "_partial_"} == defaults.keys()
    assert all(config[name] == default for name, default in defaults.items() if name not in sizes)


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "test_vit", "convnext_atto"])
def test_features_are_deterministic(name):
    network, _ = create_backbone(name, image_size=64)
    network.eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(network(x), network(x))


def test_an_unknown_name_is_refused_and_similar_ones_suggested():
    with pytest.raises(UserError, match=r"backbone.name=resnet19: .*resnet18"):
        create_backbone("resnet19")


def test_an_image_size_that_the_network_cannot_process_is_refused():
    with pytest.raises(UserError, match="data.image_size=8"):
        create_backbone("vgg11", image_size=8)


def test_small_stems_of_other_families_are_refused():
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
def test_weights_are_loaded_with_any_prefix(tmp_path, weights, prefix, kind, caplog):
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


def test_partial_weights_are_refused_by_default(tmp_path, weights):
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


def test_other_files_are_refused_and_not_executed(tmp_path, capsys):
    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("harmful.pt", "text.pt", "text.safetensors", "missing.pt"):
        with pytest.raises(UserError, match=name):
            create_backbone("test_resnet", weights=tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_is_depthwise():
    assert is_depthwise(timm.create_model("mobilenetv3_small_050"))
    assert is_depthwise(timm.create_model("convnext_atto"))
    assert not is_depthwise(timm.create_model("resnet18"))
    assert not is_depthwise(timm.create_model("test_vit"))
