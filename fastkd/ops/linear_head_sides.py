"""The sides of a loss whose rows come in chunks: linear heads, and tensors of logits."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastkd.ops.linear_head_chunks import is_capturing, product_dtype
from fastkd.precision import compute_dtype

# Rows of a product that is added to float32: its block, and the block in float32, stay in cache.
_BLOCK = 1024


class Rows:
    """The rows of a call that count, one after another.

    To find them takes a look at the labels, for which a GPU is waited for. Where a CUDA graph is
    being captured that cannot be: all rows are taken, and those that do not count are cleared.
    """

    def __init__(self, shape: torch.Size, labels: Tensor | None, ignore_index: int) -> None:
        self.shape, self.total = shape, shape.numel()
        self.count = self.total
        self.index: Tensor | None = None
        self.cleared: Tensor | None = None
        if labels is None:
            return
        counts = (labels != ignore_index).reshape(-1)
        if is_capturing(labels.device):
            self.cleared = ~counts
            return
        index = counts.nonzero()[:, 0]
        if len(index) < self.total:
            self.index, self.count = index, len(index)

    def of(self, x: Tensor) -> Tensor:
        """Those of a number or a vector for each row, `(count, ...)`."""
        flat = x.reshape(self.total, *x.shape[len(self.shape) :])
        if self.cleared is not None and flat.is_floating_point():
            return flat.masked_fill(self.cleared.view(-1, *[1] * (flat.ndim - 1)), 0)
        return flat if self.index is None else flat.index_select(0, self.index)

    def back(self, packed: Tensor) -> Tensor:
        """The inverse of `of`, with 0 in the rows that do not count."""
        if self.index is not None:
            found = packed.new_zeros(self.total, *packed.shape[1:])
            packed = found.index_copy_(0, self.index, packed)
        return packed.view(self.shape + packed.shape[1:])

    def chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, self.count, size):
            yield slice(start, min(start + size, self.count))


class Logits:
    """A tensor of logits or probabilities, or of anything with classes last, of which rows come."""

    def __init__(self, tensor: Tensor, classes: int | None, rows: Rows) -> None:
        self.rows, self.stored = rows, tensor
        self.tensor = tensor if classes is None else tensor.narrow(-1, 0, classes)
        shape = rows.total, self.tensor.shape[-1]
        try:
            self.flat: Tensor | None = self.tensor.view(shape)
        except RuntimeError:  # a copy would be as large as all logits
            self.flat = None
        self.gradient: Tensor | None = None

    def chunk(self, at: slice) -> Tensor:
        index = self.rows.index
        if self.flat is not None:
            return self.flat[at] if index is None else self.flat.index_select(0, index[at])
        if index is None:
            index = torch.arange(self.rows.total, device=self.tensor.device)
        return self.tensor[torch.unravel_index(index[at], self.rows.shape)]

    def want(self, wanted: Sequence[bool]) -> None:
        if any(wanted):
            self.gradient = self.stored.new_zeros(self.stored.shape)

    def room(self, chunk: Tensor) -> Tensor:
        """For the gradient of a chunk of logits."""
        return torch.empty_like(chunk)

    def backward(self, gradient: Tensor, at: slice) -> None:
        """Take the gradient of a chunk of logits."""
        if self.gradient is None:
            return
        to = self.gradient.view(self.rows.total, self.stored.shape[-1])[:, : gradient.shape[-1]]
        if self.rows.index is None:
            to[at] = gradient
        else:
            to.index_copy_(0, self.rows.index[at], gradient)

    def gradients(self, multiplier: Tensor | None = None) -> list[Tensor]:
        """That of the tensor, where it is wanted."""
        return [] if self.gradient is None else [_times(self.gradient, multiplier)]


class OfRows:
    """A small tensor with a number or a vector for each row."""

    def __init__(self, tensor: Tensor, rows: Rows) -> None:
        self.rows, self.packed = rows, rows.of(tensor)
        self.gradient: Tensor | None = None

    def chunk(self, at: slice) -> Tensor:
        return self.packed[at]

    def want(self, wanted: Sequence[bool]) -> None:
        if any(wanted):  # zeros, since not every loss has one for it
            self.gradient = torch.zeros_like(self.packed)

    def backward(self, gradient: Tensor, at: slice) -> None:
        """Take the gradient of a chunk."""
        if self.gradient is not None:
            self.gradient[at] = gradient

    def gradients(self) -> list[Tensor]:
        """That of the tensor, where it is wanted."""
        return [] if self.gradient is None else [self.rows.back(self.gradient)]


class Head:
    """A linear head: the logits of a chunk, and the gradients of its tensors.

    These are from the gradients of what the logits were before a softcap, which kernels compute.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        scale: float,
        softcap: float,
        dtype: torch.dtype,
        classes: int | None,
        rows: Rows,
        size: int,
    ) -> None:
        hidden, weight, *bias = tensors
        dtype = product_dtype(dtype, hidden.device)
        self.rows, self.tensors = rows, tensors
        self.scale, self.softcap = scale, softcap
        self.classes = len(weight) if classes is None else classes
        weight = weight[: self.classes].to(dtype)
        self.weight = weight if 1 in weight.stride() else weight.contiguous()
        self.bias = [x[: self.classes].to(dtype) for x in bias]
        self.hidden = rows.of(hidden).to(dtype)
        shape = min(size, rows.count), self.classes
        self.logits = hidden.new_empty(shape, dtype=dtype)
        self.to: list[Tensor | None] = [None] * len(tensors)
        self.adds = False

    def chunk(self, at: slice) -> Tensor:
        hidden, weight = self.hidden[at], self.weight.T
        to, softcap = self.logits[: len(hidden)], self.softcap
        factor = self.scale / softcap if softcap else self.scale
        if self.bias:
            torch.addmm(self.bias[0], hidden, weight, beta=factor, alpha=factor, out=to)
        elif factor == 1:
            torch.mm(hidden, weight, out=to)
        else:
            torch.addmm(to, hidden, weight, beta=0, alpha=factor, out=to)
        return to.tanh_().mul_(softcap) if softcap else to

    def want(self, wanted: Sequence[bool]) -> None:
        """Make room for the gradients of those tensors that want one: of hidden, weight, bias."""
        hidden, *others = self.tensors
        dtype = compute_dtype(self.logits)
        if wanted[0]:
            self.to[0] = hidden.new_empty(self.hidden.shape, dtype=dtype)
        written = self.classes if self.rows.count else 0
        for i, x in enumerate(others, 1):
            if wanted[i]:
                self.to[i] = to = hidden.new_empty(x.shape, dtype=dtype)
                to[written:].zero_()

    def room(self, chunk: Tensor) -> Tensor:
        """For the gradient of a chunk of logits, whose place it takes."""
        return chunk

    def backward(self, gradient: Tensor, at: slice) -> None:
        """Add what the gradient of the last chunk of logits gives; it may be overwritten."""
        hidden, scale, adds = self.hidden[at], self.scale, self.adds
        to_hidden, to_weight, *to_bias = self.to
        if to_hidden is not None:
            _multiply(gradient, self.weight, to_hidden[at], scale, False)
        if to_weight is not None:
            _multiply(gradient.T, hidden, to_weight[: self.classes], scale, adds)
        for to in to_bias:
            if to is not None:
                _add_up(gradient, to[: self.classes], scale, adds)
        self.adds = True

    def gradients(self, multiplier: Tensor | None = None) -> list[Tensor]:
        """Those that are wanted, in the precision in which they were added up."""
        to_hidden, *others = self.to
        if to_hidden is not None:
            to_hidden = self.rows.back(to_hidden)
        return [_times(to, multiplier) for to in (to_hidden, *others) if to is not None]


def _times(gradient: Tensor, multiplier: Tensor | None) -> Tensor:
    return gradient if multiplier is None else gradient.mul_(multiplier)


def _multiply(a: Tensor, b: Tensor, to: Tensor, scale: float, adds: bool) -> None:
    """`to = scale * a @ b`, or that added to it; `to` may be wider than the factors.

    On a CPU torch has no product of half precision that is wider: it is taken in blocks.
    """
    beta = 1 if adds else 0
    if to.dtype == a.dtype:
        torch.addmm(to, a, b, beta=beta, alpha=scale, out=to)
        return
    if a.is_cuda and torch.version.hip is None:
        torch.ops.aten.addmm.dtype_out(to, a, b, to.dtype, beta=beta, alpha=scale, out=to)
        return
    narrow = a.new_empty(min(_BLOCK, len(a)), b.shape[1])
    wide = torch.empty_like(narrow, dtype=to.dtype)
    for part, of_a in zip(to.split(_BLOCK), a.split(_BLOCK), strict=True):
        found = narrow[: len(part)]
        torch.addmm(found, of_a, b, beta=0, alpha=scale, out=found)
        if adds:
            # Not at once: adding two dtypes is slow in torch.
            part.add_(wide[: len(part)].copy_(found))
        else:
            part.copy_(found)


def _add_up(gradient: Tensor, to: Tensor, scale: float, adds: bool) -> None:
    """`to = scale * gradient.sum(0)`, or that added to it."""
    parts = zip(to.split(_BLOCK), gradient.split(_BLOCK, 1), strict=True)
    for part, of_gradient in parts:
        found = of_gradient.to(to.dtype).sum(0) * scale
        part.copy_(part + found if adds else found)
