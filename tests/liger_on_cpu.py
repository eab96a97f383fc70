"""Liger-Kernel's losses in Triton's interpreter: `python liger_on_cpu.py calls results`.

A process of its own, because the interpreter is chosen before Triton is imported, for all of it.
Calls are `(name, keywords, student, teacher, labels, grad_output)` with logits at temperature 1;
results are `(loss, gradient)`, or the name of the error.
"""

import sys

import numpy as np
import torch
import triton.language as tl
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss, LigerTVDLoss
from triton.runtime import interpreter

_convert = interpreter._implicit_cvt


def as_compiled(argument):
    """A compiled kernel finds a scalar of float32 where it is given a Python float."""
    if isinstance(argument, float):
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _convert(argument)


def jsd(keywords, student, teacher, labels):
    return LigerJSD(**keywords)(student.log_softmax(-1), teacher.log_softmax(-1), labels)


def kl(keywords, student, teacher, labels):
    target = teacher.log_softmax(-1) if keywords["log_target"] else teacher.softmax(-1)
    return LigerKLDIVLoss(**keywords)(student.log_softmax(-1), target)


def tvd(keywords, student, teacher, labels):
    return LigerTVDLoss(**keywords)(student.softmax(-1), teacher.softmax(-1), labels)


def linear_jsd(keywords, student, teacher, labels):
    """Of hidden states and heads; the heads are identities, so that hidden states are logits."""
    head = torch.eye(student.shape[-1])
    return LigerFusedLinearJSDLoss(**keywords, compiled=False)(
        student, head, teacher, head.clone(), labels
    )


def outcome(name, keywords, student, teacher, labels, grad_output):
    leaf = student.clone().requires_grad_()
    try:
        loss = globals()[name](keywords, leaf, teacher.clone(), labels)
        (gradient,) = torch.autograd.grad(loss, leaf, grad_output.expand_as(loss))
    except ArithmeticError as error:
        return type(error).__name__
    return loss.detach(), gradient


if __name__ == "__main__":
    interpreter._implicit_cvt = as_compiled
    with np.errstate(invalid="ignore", divide="ignore"):  # where a block has no class
        torch.save([outcome(*call) for call in torch.load(sys.argv[1])], sys.argv[2])
