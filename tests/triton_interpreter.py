"""Triton's interpreter cuts float32 off to bfloat16, where every GPU rounds to the nearest.

Importing this module gives the interpreter the rounding of the hardware.
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
