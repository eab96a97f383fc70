"""How much memory operators ask for."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Within it `sizes` gets the bytes of each tensor that an operator makes, in their order."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        leaves = torch.utils._pytree.tree_leaves
        known = {storage(x) for x in leaves((arguments, keywords)) if isinstance(x, torch.Tensor)}
        for result in leaves(results):
            if isinstance(result, torch.Tensor) and storage(result) not in known:
                self.sizes.append(result.untyped_storage().nbytes())
        return results


def storage(tensor):
    return tensor.untyped_storage().data_ptr()
