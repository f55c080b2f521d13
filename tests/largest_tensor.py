"""Size of the largest tensor that a function makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def largest_tensor(call):
    """Number of elements of the largest tensor that a function makes."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return made

    with Largest() as mode:
        call()
    return mode.elements
