"""Checkpoints without a run."""

from dataclasses import asdict

import torch

import twoview


def save_checkpoint(path, seed):
    """A checkpoint of a random network, in the form of a run's."""
    encoder = twoview.load("random:test_resnet", image_size=32, seed=seed).with_card(mean=(0.4,) * 3, std=(0.2,) * 3)
    tensors = {f"method.backbone.{name}": value for name, value in encoder.network.state_dict().items()}
    torch.save({"twoview": asdict(encoder.card), "state_dict": tensors}, path)
    return path
