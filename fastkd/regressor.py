"""How the regressor of `fastkd.nn.HintLoss` is applied: called, unless that cannot be noticed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Conv2d, Parameter

# Private to torch; where it is missing every regressor is called, which is always right.
_any_global_hook: Callable[[], object] = getattr(
    torch.nn.modules.module, "_has_any_global_hook", lambda: True
)


def plain_parameters(module: torch.nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of what is exactly a 1×1 convolution, with nothing that its call would run.

    None of any other module, which must be called: its weight may be computed by a hook or a
    parametrization, replaced by an adapter's, or be sharded.
    """
    if type(module) is not Conv2d or not _is_pointwise(module) or "forward" in module.__dict__:
        return None
    if module.dilation != (1, 1) or module.groups != 1 or module.padding_mode != "zeros":
        return None
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks) or _any_global_hook():
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(weight) is not Parameter or type(bias) not in (Parameter, type(None)):
        return None
    return weight, bias


def regress(module: torch.nn.Module, features: Tensor) -> Tensor:
    """`module(features)`; a 1×1 convolution takes any number of spatial dimensions."""
    spatial = features.shape[2:]
    if len(spatial) == 2 or not isinstance(module, Conv2d) or not _is_pointwise(module):
        return module(features)
    if features.ndim < 2:
        return features  # which `hint_loss` refuses
    regressed = module(features.reshape(*features.shape[:2], math.prod(spatial), 1))
    return regressed.reshape(*regressed.shape[:2], *spatial)


def _is_pointwise(module: Conv2d) -> bool:
    return module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0)
