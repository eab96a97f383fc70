"""Corrections of Triton's interpreter, made when this module is imported.

It cuts float32 off to bfloat16, where every GPU rounds to the nearest. And it does over and over
what takes most of its time: it prepares Triton's language for each function that a kernel calls,
and describes types and shapes for each operation.
"""

import functools
import math

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


@functools.cache
def _uses(function, module):
    return any(value is module for value in function.__globals__.values())


interpreter._patch_lang = _patch_once


_numpy_dtype = interpreter._get_np_dtype
_numpy_dtypes: dict[str, np.dtype] = {}


def _numpy_dtype_once(dtype):
    """By name, since Triton's types of pointers and blocks have no hash."""
    element = dtype.scalar
    if element.name not in _numpy_dtypes:
        _numpy_dtypes[element.name] = _numpy_dtype(element)
    return _numpy_dtypes[element.name]


interpreter._get_np_dtype = _numpy_dtype_once


@functools.cache
def _size_and_shape(shape):
    """Of a tensor, as it has them; nothing changes either."""
    sizes = [tl.core.constexpr(size) for size in shape]
    return tl.core.constexpr(math.prod(shape)), tl.core.tuple(sizes)


def _make_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    shape = tuple(type.shape.values) if type.is_block() else ()
    self.numel, self.shape = _size_and_shape(shape)


tl.core.tensor.__init__ = _make_tensor

_make_block_type = tl.core.block_type.__init__
_block_types: dict[tuple[str, tuple[int, ...]], dict] = {}


def _make_block_type_once(self, element_ty, shape):
    key = element_ty.name, tuple([getattr(size, "value", size) for size in shape])
    if key not in _block_types:
        _make_block_type(self, element_ty, shape)
        _block_types[key] = vars(self).copy()
    vars(self).update(_block_types[key], element_ty=element_ty)


tl.core.block_type.__init__ = _make_block_type_once


_semantic = type(interpreter.interpreter_semantic)
_broadcast = _semantic.broadcast_impl_value


def _broadcast_if_shapes_differ(self, lhs, rhs):
    blocks = lhs.type.is_block() and rhs.type.is_block()
    if blocks and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


_semantic.broadcast_impl_value = _broadcast_if_shapes_differ
