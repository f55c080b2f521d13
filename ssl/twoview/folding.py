"""Folding of BatchNorm into the convolution before it, for faster features."""

import copy
from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d, get_notrace_functions, get_notrace_modules
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy of a network that computes the same features in evaluation mode without BatchNorm.

    Running statistics, weight and bias of a BatchNorm become part of the weights and the bias of the convolution whose
    output it normalizes. This changes features by rounding only. A BatchNorm stays if anything else uses the output of
    the convolution, or if either module is applied more than once or has been changed, for example by a
    parametrization.

    Args:
        network: a network for images ``[N, C, H, W]``; not changed.

    Returns:
        The copy, with the weights of convolutions in channels_last format; or the network itself if it has nothing to
        fold, or cannot be traced by :mod:`torch.fx`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fold_batch_norm(network)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    try:
        pairs = _pairs(copy.deepcopy(network).eval())
    except Exception:  # the forward pass of any network may fail in any way when it is traced
        return network
    if not pairs:
        return network
    folded = copy.deepcopy(network).eval()
    for conv, norm in pairs:
        before, after = folded.get_submodule(conv), folded.get_submodule(norm)
        rest = nn.Sequential(after.drop, after.act) if isinstance(after, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(conv, fuse_conv_bn_eval(before, after))  # type: ignore[type-var, arg-type]
        folded.set_submodule(norm, rest)
    for module in folded.modules():
        if isinstance(module, nn.Conv2d):  # or torch would copy the weights in each forward pass of such images
            module.to(memory_format=torch.channels_last)
    return folded


class _Tracer(torch.fx.Tracer):
    """Traces calls of timm's layers that must not be traced inside as single steps, as timm does."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in get_notrace_modules() or super().is_leaf_module(m, module_qualified_name)


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of each convolution and of the BatchNorm that can be folded into it."""
    nodes = list(_Tracer().trace(network).nodes)
    modules = dict(network.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(node.target)]) for node in nodes if node.op == "call_module")
    # A module whose weights are read directly is used more than once.
    owners = (str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr")
    calls.update(id(modules[owner]) for owner in owners)

    def once(node: Any, *kinds: type) -> bool:
        if not isinstance(node, torch.fx.Node) or node.op != "call_module":
            return False
        module = modules[str(node.target)]
        # Subclasses, such as convolutions with standardized weights, may compute something else.
        return type(module) in kinds and calls[id(module)] == 1 and not _has_hooks(module)

    found = []
    for node in nodes:
        if once(node, nn.BatchNorm2d, BatchNormAct2d) and modules[str(node.target)].running_mean is not None:
            before = node.args[0] if node.args else None
            if once(before, nn.Conv2d) and len(before.users) == 1:  # type: ignore[union-attr]
                found.append((str(before.target), str(node.target)))  # type: ignore[union-attr]
    return found


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
