"""Liger-Kernel's modules in Triton's interpreter: `python liger_modules_on_cpu.py calls results`.

A process of its own, as `liger_on_cpu` is. Calls are `(name, keywords, tensors, learning)`: the
module, its own keywords, what it is called with, and how many of these are given gradients. Results
are what it returned, in a tuple, and the gradients for a `grad_output` of 1.5.
"""

import sys

import numpy as np
import torch
from liger_kernel import chunked_loss, transformers
from liger_on_cpu import as_compiled
from triton.runtime import interpreter


def outcome(name, keywords, tensors, learning):
    home = chunked_loss if hasattr(chunked_loss, name) else transformers
    tensors = [x.clone() if isinstance(x, torch.Tensor) else x for x in tensors]
    leaves = [x for i, x in enumerate(tensors) if i in learning]
    for leaf in leaves:
        leaf.requires_grad_()
    result = getattr(home, name)(**keywords)(*tensors)
    result = result if isinstance(result, tuple) else (result,)
    grad_output = torch.full_like(result[0], 1.5)
    return [x.detach() for x in result], torch.autograd.grad(result[0], leaves, grad_output)


if __name__ == "__main__":
    interpreter._implicit_cvt = as_compiled
    with np.errstate(invalid="ignore", divide="ignore"):  # where a block has no class
        torch.save([outcome(*call) for call in torch.load(sys.argv[1])], sys.argv[2])
