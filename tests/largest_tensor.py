"""How large the largest tensor is that a piece of code makes: whether something of S x S elements exists in it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """After ``with LargestTensor() as largest: ...`` ``largest.numel`` is the size of the largest result, in elements.

    Its memory counts, not its shape: an expanded tensor is as large as what it was expanded from.
    """

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // max(t.element_size(), 1))
        return result
