"""Corrections of Triton's interpreter, made when this module is imported.

It cuts float32 off to bfloat16, where every GPU rounds to the nearest. And it prepares Triton's
language anew for each function that a kernel calls, in which it spends half of its time.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_builder = interpreter.InterpreterBuilder
_cast = _builder.cast_impl


def _round(self, src, dst_type):
    if dst_type.scalar != tl.bfloat16 or not np.issubdtype(src.data.dtype, np.floating):
        return _cast(self, src, dst_type)
    rounded = torch.from_numpy(src.data.astype(np.float32)).bfloat16()
    return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), dst_type.scalar)


_builder.cast_impl = _round


_patch = interpreter._patch_lang
_patched: set[str] = set()


class _Nothing:
    def restore(self):
        pass


def _patch_once(function):
    """A kernel's functions find what was prepared for the kernel."""
    used = {name for name, module in (("tl", tl), ("core", tl.core)) if _uses(function, module)}
    if used <= _patched:
        return _Nothing()
    _patched.update(used)
    scope = _patch(function)
    restore = scope.restore

    def put_back():
        _patched.clear()
        restore()

    scope.restore = put_back
    return scope


def _uses(function, module):
    return any(value is module for value in function.__globals__.values())


interpreter._patch_lang = _patch_once
