"""Numbers whose value compiled code does not know.

`torch.compile` makes a float argument symbolic when it sees a second value. It compiles once more
for each further value, unless all that the symbol meets are additions, subtractions,
multiplications, divisions, comparisons and powers with tensors.
"""

from typing import Any

import torch
from torch import Tensor


def is_symbolic(value: float) -> bool:
    """Whether compiled code is to serve any value of this number."""
    if not torch.compiler.is_compiling():
        return False
    # Imported where torch has long imported it: by itself it takes as long as all of torch.
    from torch.fx.experimental import symbolic_shapes

    # Experimental in torch; without it a symbol becomes a constant.
    if not hasattr(symbolic_shapes, "has_static_value"):
        return False
    return not symbolic_shapes.has_static_value(value)


def as_tensor(value: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A scalar tensor of a symbolic number; `torch.tensor` would ask for its value."""
    return torch.ones((), dtype=dtype, device=device) * value


def operand(value: float, like: Tensor) -> Any:
    """The number itself; a symbolic one as a tensor, which more operations take."""
    return as_tensor(value, like.dtype, like.device) if is_symbolic(value) else value
