"""Activation checkpointing: activations are computed again in the backward pass, instead of being kept in memory."""

from typing import Any

import torch
from torch import nn

from twoview.errors import UserError


def recompute_activations(network: nn.Module, name: str) -> None:
    """Let a timm network keep only the inputs of its blocks, and compute their activations again when they are needed.

    Outputs, gradients, random draws and the running statistics of BatchNorm are those of the unchanged network.

    Args:
        network: network of timm; changed in place.
        name: name of the network, for the message.

    Raises:
        UserError: if timm does not support it for this network.

    Example:
        >>> import timm
        >>> recompute_activations(timm.create_model("test_resnet", num_classes=0), "test_resnet")
    """
    try:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError) as error:
        message = f"timm does not support it for {name}; leave it out, or choose another network"
        raise UserError(f"backbone.checkpointing=true: {message}") from error
    update_statistics_once(network)


def update_statistics_once(network: nn.Module) -> None:
    """Let BatchNorm leave its running statistics unchanged when it is applied again in a backward pass.

    Args:
        network: network; hooks are added to its BatchNorm modules that do not have them.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not hasattr(module, "updates_once"):
            module.updates_once = True  # type: ignore[assignment]
            module.register_forward_pre_hook(_use_copies)
            # A recomputation ends by an exception as soon as all activations that are needed have been computed.
            module.register_forward_hook(_restore, always_call=True)


def updates_statistics_once(network: nn.Module) -> bool:
    """Return whether the network has BatchNorm modules that :func:`update_statistics_once` has changed."""
    return any(hasattr(module, "updates_once") for module in network.modules())


def _use_copies(module: nn.Module, *_: Any) -> None:
    # A compiled network updates its statistics in the forward pass only.
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # in a backward pass
        own = dict(module.named_buffers(recurse=False))
        module.own_statistics = own  # type: ignore[assignment]
        for name, value in own.items():
            setattr(module, name, value.clone())


def _restore(module: nn.Module, *_: Any) -> None:
    for name, value in vars(module).pop("own_statistics", {}).items():
        setattr(module, name, value)
