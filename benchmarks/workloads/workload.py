"""A workload: one loss on inputs of certain shapes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastkd

Shape = tuple[int, ...]
Argument = Tensor | list[Tensor]


@dataclass
class Inputs:
    """The arguments of one call. Dimension 0 of every tensor in `batch` counts samples."""

    batch: tuple[Argument, ...]
    parameters: dict[str, Tensor]

    def leaves(self) -> list[Tensor]:
        """What receives a gradient: the student's side and the parameters that learn."""
        learned = [p for p in self.parameters.values() if p.requires_grad]
        return [*tensors(self.batch[0]), *learned]

    def samples(self) -> int:
        return tensors(self.batch[0])[0].shape[0]

    def chunks(self, elements: int, dtype: torch.dtype) -> Iterator["Inputs"]:
        """Copies of a few samples at a time, about so many elements of the student's."""
        total = sum(t.numel() for t in tensors(self.batch[0]))
        step = max(1, elements * self.samples() // total)
        for start in range(0, self.samples(), step):
            part = slice(start, start + step)
            yield Inputs(
                tuple(
                    [_copy(t[part], dtype) for t in a]
                    if isinstance(a, list)
                    else _copy(a[part], dtype)
                    for a in self.batch
                ),
                {name: _copy(t, dtype) for name, t in self.parameters.items()},
            )


def tensors(argument: Argument) -> list[Tensor]:
    """The maps of a call, one or several."""
    return argument if isinstance(argument, list) else [argument]


def total(losses: list[Tensor]) -> Tensor:
    """Their sum, without a zero to begin with: that would be one more kernel on a GPU."""
    return sum(losses[1:], start=losses[0])


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)


@dataclass(frozen=True)
class Workload:
    """One loss, by the name of its function in fastkd, on the pairs `student` and `teacher`,
    or on one student and several teachers.

    `eager` takes the arguments of the fastkd function. `fused` stands in for that function where
    it returns no loss. The reads of the student are those of the best possible kernel: in one
    forward and backward, and where one sample stays on the chip between two reads. `devices` are
    those that it is measured on. A loss on relations needs `samples_least`, also in a smoke test.
    Of `half_masked` one half of the rows counts, drawn at random; the mask is an argument.
    `prepare` changes inputs that were drawn, in place, and may add arguments.
    Where there are `classes` the sides are hidden states, and each has a weight with so many rows.
    `parts` yields what adds up to the exact loss, where that in one piece has no room.
    """

    loss: str
    family: str
    student: tuple[Shape, ...]
    teacher: tuple[Shape, ...]
    eager: Callable[..., Tensor]
    title: str = ""
    keywords: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    headline: bool = False
    fused: Callable[..., Tensor] | None = None
    labels: bool = False
    half_masked: bool = False
    prepare: Callable[[Inputs], None] | None = None
    regressor: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    student_reads: int = 1
    student_reads_on_chip: int = 1
    devices: tuple[str, ...] = ("cpu", "cuda")
    samples_least: int = 1
    classes: int | None = None
    parts: Callable[..., Iterator[Tensor]] | None = None

    @property
    def name(self) -> str:
        shapes = f"batch {self.student[0][0]}" if len(self.student) > 1 else _show(self.student[0])
        return f"{self.title}, {shapes}" if self.title else shapes

    @property
    def function(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = self.fused or getattr(fastkd, self.loss)
        return function

    def exact(self, inputs: Inputs) -> Iterator[Tensor]:
        """What adds up to the reference's loss."""
        arguments = {**inputs.parameters, **self.keywords}
        if self.parts is not None:
            yield from self.parts(*inputs.batch, **arguments)
        else:
            yield self.function(*inputs.batch, **arguments, backend="reference")

    def shrunk(self, factor: int) -> "Workload":
        """The same on a fraction of the samples, for smoke tests."""
        student, teacher = (
            tuple((max(self.samples_least, shape[0] // factor), *shape[1:]) for shape in side)
            for side in (self.student, self.teacher)
        )
        classes = None if self.classes is None else max(16, self.classes // factor)
        return replace(self, student=student, teacher=teacher, classes=classes)

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(shape: Shape, learns: bool = False) -> Tensor:
            values = 2 * torch.randn(shape, generator=generator, device=device)
            return values.to(dtype, memory_format=self.memory_format).requires_grad_(learns)

        def side(shapes: tuple[Shape, ...], learns: bool) -> Argument:
            tensors = [draw(shape, learns) for shape in shapes]
            return tensors if len(tensors) > 1 else tensors[0]

        batch = [side(self.student, True), side(self.teacher, False)]
        parameters = {}
        if self.labels:
            rows, classes = self.student[0]
            batch.append(torch.randint(classes, (rows,), generator=generator, device=device))
        if self.half_masked:
            rows = self.student[0][0]
            batch.append(torch.randperm(rows, generator=generator, device=device) < rows // 2)
        if self.regressor:
            channels = (self.teacher[0][1], self.student[0][1])
            parameters["regressor_weight"] = draw((*channels, 1, 1), True)
            parameters["regressor_bias"] = draw(channels[:1], True)
        if self.classes is not None:
            parameters["weight"] = draw((self.classes, self.student[0][1]), True)
            parameters["teacher_weight"] = draw((self.classes, self.teacher[0][1]))
        inputs = Inputs(tuple(batch), parameters)
        if self.prepare is not None:
            with torch.no_grad():
                self.prepare(inputs)
        return inputs

    def ideal_bytes(self, dtype: torch.dtype, on_chip: int) -> int:
        """What the best possible kernel moves: reads of both sides, and the gradient.

        Rows that do not count are not read.
        """
        of_rows = 2 if self.half_masked else 1
        total = sum(_elements(shape) for shape in self.teacher) * dtype.itemsize // of_rows
        for shape in self.student:
            size = _elements(shape) * dtype.itemsize
            fits = size <= on_chip * shape[0]
            reads = self.student_reads_on_chip if fits else self.student_reads
            total += reads * size // of_rows + size
        if self.classes is not None:  # the weights are read, and the student's gets a gradient
            widths = 2 * self.student[0][1] + self.teacher[0][1]
            total += self.classes * widths * dtype.itemsize
        return total


def _elements(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _show(shape: Shape) -> str:
    return f"({','.join(map(str, shape))})"
