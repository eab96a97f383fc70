"""Hints as a module, which owns the regressor."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastkd import regressor
from fastkd.facts import Backend
from fastkd.losses import pairs
from fastkd.losses.hint import hint_loss
from fastkd.nn.base import Loss


class _Half(int):
    """The keyword `half` of hints, which is `torch.nn.Module.half` where it is called."""

    convert: Callable[[], torch.nn.Module]

    def __call__(self) -> torch.nn.Module:
        return self.convert()

    def __repr__(self) -> str:
        return repr(bool(self))


class HintLoss(Loss):
    """`fastkd.hint_loss` with a regressor of its own, of `student_channels` to `teacher_channels`.

    The regressor is an ordinary 1×1 `torch.nn.Conv2d` submodule: optimizers, DDP and
    `state_dict` see it. It exists where the channel counts are equal, too. `HintLoss()` has none:
    it is the plain criterion, for a program whose regressor is elsewhere, or that needs none.

    Another module may take its place, and it may be wrapped, hooked, pruned, parametrized or
    sharded: then it is called with each of the student's features, and computes as modules do, in
    the features' dtype and, under autocast, in autocast's. The plain convolution, which
    `fastkd.hint_loss` takes by its weight, computes in float32 or wider at all times. A 1×1
    `Conv2d` takes features `(B, C, *spatial)` of any number of dimensions in either case.

    The attribute `half` is the keyword, and `half()` converts to float16, as of every module.

    Args:
        student_channels: C_s. Default: None, no regressor.
        teacher_channels: C_t. Default: None, no regressor; both are given or none.
        bias: of the regressor. Default: True.
        pair_weights: see `fastkd.hint_loss`, as are the others. Default: None.
        reduction: Default: `"batchmean"`.
        half: Default: True.
        backend: Default: None.

    Raises:
        ValueError: one of the channels is given alone, or `bias=False` without a regressor.

    Example:
        >>> criterion = fastkd.nn.HintLoss(32, 64)
        >>> student, teacher = torch.randn(8, 32, 16, 16), torch.randn(8, 64, 16, 16)
        >>> criterion(student, teacher).backward()
        >>> criterion.regressor.weight.grad.shape
        torch.Size([64, 32, 1, 1])
    """

    pair_weights: Iterable[float] | None
    reduction: str
    backend: Backend | None
    regressor: torch.nn.Module | None

    def __init__(
        self,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        *,
        bias: bool = True,
        pair_weights: Iterable[float] | None = None,
        reduction: str = "batchmean",
        half: bool = True,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(pair_weights=pair_weights, reduction=reduction, half=half, backend=backend)
        if student_channels is None or teacher_channels is None:
            if not (student_channels is teacher_channels and bias):
                raise ValueError(
                    "a regressor needs the channels of both sides, and only a regressor has a "
                    f"bias, got {student_channels} and {teacher_channels} channels, bias={bias}"
                )
            self.register_module("regressor", None)
        else:
            self.regressor = torch.nn.Conv2d(student_channels, teacher_channels, 1, bias=bias)

    @property
    def half(self) -> Any:
        """The paper's factor ½, True or False."""
        if not isinstance(self._half, bool):
            return self._half
        half = _Half(self._half)
        half.convert = super().half
        return half

    @half.setter
    def half(self, value: bool) -> None:
        self._half = bool(value) if isinstance(value, _Half) else value

    def forward(
        self, student: Tensor | Iterable[Tensor], teacher: Tensor | Iterable[Tensor]
    ) -> Tensor:
        """See `fastkd.hint_loss`."""
        keywords: dict[str, Any] = {
            "pair_weights": self.pair_weights,
            "reduction": self.reduction,
            "half": self._half,
            "backend": self.backend,
        }
        if self.regressor is None:
            return hint_loss(student, teacher, **keywords)
        plain = regressor.plain_parameters(self.regressor)
        if plain is not None:
            weight, bias = plain
            return hint_loss(
                student, teacher, regressor_weight=weight, regressor_bias=bias, **keywords
            )
        students, teachers, is_sequence = pairs.check(student, teacher)
        students = [regressor.regress(self.regressor, features) for features in students]
        if is_sequence:
            return hint_loss(students, teachers, **keywords)
        return hint_loss(students[0], teachers[0], **keywords)
