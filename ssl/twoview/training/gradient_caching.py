"""Exact gradients of large batches whose images are encoded in pieces, by gradient caching (GradCache).

Gao et al. 2021, arXiv:2101.06983. The loss of a whole batch needs only the outputs of the networks, which are small:

1. All pieces are encoded without gradient.
2. The loss of the whole batch and its gradient with respect to the outputs are computed.
3. In the backward pass, each piece is encoded again, now with gradient, and the gradient of its outputs is propagated
   to the parameters. The gradients of the pieces are added up.

Only the activations of one piece are in memory at any time. The time of one more forward pass is the price.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twoview.augment import derive_seed
from twoview.errors import require
from twoview.methods import Encoded, Method, Step
from twoview.momentum import MomentumCopy
from twoview.negatives import NegativeQueue

Views = Callable[[slice], Sequence[Tensor]]


def split_batch(images: int, micro_batch: int) -> list[slice]:
    """Divide the images of a batch into the smallest number of pieces of nearly equal size.

    Args:
        images: number of images N, >= 2.
        micro_batch: largest number of images in a piece, >= 2. If it is 2 and N is odd, one piece has three images,
            because a single image cannot be normalized by BatchNorm.

    Returns:
        Positions of the images of each piece.

    Example:
        >>> split_batch(10, micro_batch=4)
        [slice(0, 4, None), slice(4, 7, None), slice(7, 10, None)]
    """
    number = min(-(-images // micro_batch), max(1, images // 2))
    size, larger = divmod(images, number)
    ends = [size * (i + 1) + min(i + 1, larger) for i in range(number)]
    return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def check_micro_batch(micro_batch: int, method: Method, images: int, world: int) -> None:
    """Check that the batch of a rank can be encoded in pieces.

    Args:
        micro_batch: largest number of images in a piece.
        method: method that is trained.
        images: number of images of a batch on a rank.
        world: number of ranks.

    Raises:
        UserError: if the loss of the method does not depend on the other images of a batch, or a piece has fewer than
            two images for each group of BatchNorm.
    """
    knob, name = f"trainer.micro_batch={micro_batch}", type(method).__name__
    same = f"{name} does not compare the images of a batch, so pieces would only repeat work"
    require(method.in_batch, f"{knob}: {same}; use trainer.accumulate=N with a smaller data.batch_size instead")
    groups = max(1, method.bn_groups // world) if method.bn in ("split", "shuffle") else 1
    smallest = min(piece.stop - piece.start for piece in split_batch(images, micro_batch))
    message = f"pieces of {smallest} images leave fewer than two for each of the {groups} BatchNorm groups of a device"
    require(smallest >= 2 * groups, f"{knob}: {message}; choose at least {4 * groups}, or method.bn=plain")


def step_in_pieces(
    method: Method,
    views: Views,
    pieces: Sequence[slice],
    key: Sequence[int],
    ids: Tensor | None = None,
    labels: Tensor | None = None,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Step:
    """Compute what ``method(*views)`` returns, with the activations of only one piece in memory at any time.

    The gradient of ``Step.loss`` is computed in its backward pass, by a second forward pass of each piece. It is that
    of the whole batch up to rounding if the networks treat each image by itself. BatchNorm normalizes each piece
    separately. Its running statistics are updated once for each piece, in the first forward pass. Momentum encoders are
    applied in the first forward pass only.

    Args:
        method: method whose ``encode`` may be called on parts of a batch.
        views: function that returns the views ``[M, C, H, W]`` of the images at the positions of a slice; called twice
            for each piece, and must return the same views.
        pieces: positions of the images of each piece, which together are all N images of this rank, in order.
        key: integers >= 0 that determine the random draws of the networks, such as dropout. The draws of a piece are
            the same in both forward passes.
        ids: int64 ``[N]``, index of each image in the data set.
        labels: int64 ``[N]`` classes.
        context: returns the context of a forward pass, such as autocast; the backward pass runs outside of it.

    Returns:
        The result of ``method.loss`` for the whole batch.
    """
    passes = Pieces(method, views, pieces, key, context)
    with torch.no_grad():
        encoded = join_outputs([passes.encode(i) for i in range(len(pieces))])
    # In fp32, since gradients of half precision would underflow without the scale of a gradient scaler.
    outputs = [_in_float(z.detach()).requires_grad_() for z in (*encoded.embeddings, *encoded.predictions)]
    number = len(encoded.embeddings)
    embeddings, predictions = tuple(outputs[:number]), tuple(outputs[number:])
    step = method.loss(Encoded(encoded.features, embeddings, predictions, encoded.targets), ids, labels)
    parameters = [p for p in method.parameters() if p.requires_grad]
    with torch.autocast(step.loss.device.type, enabled=False):
        # Parameters such as a temperature may enter the loss without a network.
        gradients = torch.autograd.grad(step.loss, [*outputs, *parameters], allow_unused=True)

    def backward(scale: Tensor) -> list[Tensor | None]:
        scaled = [None if gradient is None else gradient * scale for gradient in gradients]
        direct, of_networks = scaled[len(outputs) :], passes.gradients(scaled[: len(outputs)], parameters)
        return [_sum(one, other) for one, other in zip(direct, of_networks, strict=True)]

    step.loss = _LossInPieces.apply(step.loss.detach(), backward, *parameters)
    return step


def copy_buffers(method: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copy all buffers but those of queues, which forward passes do not change; see :func:`restore_buffers`."""
    modules = (module for module in method.modules() if not isinstance(module, NegativeQueue))
    return [(buffer, buffer.clone()) for module in modules for buffer in module.buffers(recurse=False)]


def restore_buffers(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set buffers, such as the statistics of BatchNorm, to the values that :func:`copy_buffers` has copied."""
    for buffer, before in copies:
        buffer.copy_(before)


class _LossInPieces(torch.autograd.Function):
    """Returns a loss; its backward pass calls a function that returns the gradient of each parameter.

    All parameters are inputs, so that each of them receives one gradient, and the hooks of DistributedDataParallel run
    once.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, backward: Callable[[Tensor], list[Tensor | None]], *_: Tensor) -> Tensor:
        ctx.gradients = backward
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # which holds the images of the batch
        return None, None, *gradients(scale)


class Pieces:
    """The forward passes of the pieces of a batch; the arguments are those of :func:`step_in_pieces`.

    Attributes:
        momentum_outputs: outputs of momentum encoders in the first pass, a list for each piece, in the order of calls.
    """

    def __init__(
        self,
        method: Method,
        views: Views,
        pieces: Sequence[slice],
        key: Sequence[int],
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.method, self.views, self.pieces, self.key, self.context = method, views, pieces, key, context
        self.momentum_outputs: list[list[Tensor]] = []

    def encode(self, piece: int) -> Encoded:
        """Apply the networks to a piece; the pieces must be encoded in order the first time."""
        again = piece < len(self.momentum_outputs)
        if not again:
            self.momentum_outputs.append([])
        views = self.views(self.pieces[piece])
        key = (*self.key, piece)
        with _momentum_encoders(self.method, self.momentum_outputs[piece], again, key), self.context():
            torch.manual_seed(derive_seed(key))
            return self.method.encode(*views)

    def gradients(self, of_outputs: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Propagate the gradients of the outputs of all images to the parameters, by a second forward pass."""
        buffers = copy_buffers(self.method)
        total: list[Tensor | None] = [None] * len(parameters)
        for i, piece in enumerate(self.pieces):
            with torch.enable_grad():
                encoded = self.encode(i)
            pairs = zip((*encoded.embeddings, *encoded.predictions), of_outputs, strict=True)
            used = [(z, g[piece].to(z.dtype)) for z, g in pairs if g is not None and z.requires_grad]
            found = torch.autograd.grad([z for z, _ in used], parameters, [g for _, g in used], allow_unused=True)
            total = [_sum(one, other) for one, other in zip(total, found, strict=True)]
        restore_buffers(buffers)
        return total


@contextlib.contextmanager
def _momentum_encoders(method: Method, outputs: list[Tensor], again: bool, key: Sequence[int]) -> Iterator[None]:
    """Within this context, momentum encoders append what they return to ``outputs``, or, again, return that.

    After each of their calls the random number generator is seeded, because no random numbers are drawn again.
    """
    encoders = [module for module in method.modules() if isinstance(module, MomentumCopy)]
    calls = 0

    def called(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        torch.manual_seed(derive_seed((*key, calls)))
        if not again:
            outputs.append(output)

    hooks = [encoder.register_forward_hook(called) for encoder in encoders]
    stored = iter(outputs) if again else None
    for encoder in encoders:
        encoder.stored_outputs = stored
    try:
        yield
    finally:
        for encoder, hook in zip(encoders, hooks, strict=True):
            encoder.stored_outputs = None
            hook.remove()


def join_outputs(parts: Sequence[Encoded]) -> Encoded:
    """Outputs of the networks for all images."""

    def join(name: str) -> tuple[Tensor, ...]:
        return tuple(map(torch.cat, zip(*(getattr(part, name) for part in parts), strict=True)))

    features = torch.cat([part.features for part in parts])
    return Encoded(features, join("embeddings"), join("predictions"), join("targets"))


def _in_float(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total + gradient  # not in place: autograd may return one tensor for several parameters
