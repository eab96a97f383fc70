"""Linear heads: what lives from forward to backward, what forward takes, what is multiplied."""

import pytest
import torch
from linear_heads import NUMBERS, head, other
from split import Alike
from torch.profiler import ProfilerActivity, profile

import fastkd

N, CLASSES, H = 256, 2048, 16
CHUNK = 16
LOGITS = N * CLASSES * 4
OF_CHUNK = LOGITS // N * CHUNK
WEIGHT = CLASSES * H * 4
SMALL = 64 * 1024  # hidden states, losses and other numbers of rows


# Over ranks the sizes are those of one, and so is what it takes.
GROUPS = {"alone": None, "a rank of 4": Alike(4)}
every_group = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())


class Watch:
    """The bytes that an action allocated and kept, their peak, and the rows of its products."""

    def __init__(self, action):
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True
        ) as found:
            self.result = action()
        events = found.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self.kept = self.peak = 0
        for _, change in changes:
            self.kept += change
            self.peak = max(self.peak, self.kept)
        products = [e for e in events if e.name() in ("aten::mm", "aten::addmm")]
        self.products = [[s for s in e.shapes() if len(s) == 2] for e in products]


def sides(teacher, **numbers):
    student = head((N,), CLASSES, H, bias=False, **numbers)
    if teacher == "head":
        return student, head((N,), CLASSES, H, bias=False, **numbers)
    return student, other(teacher, (N,), CLASSES)


def call(student, teacher, **keywords):
    student, teacher = student.of(student.tensors), teacher.of(teacher.tensors)
    return fastkd.soft_target_loss(student, teacher, **{"chunk_size": CHUNK, **keywords})


def learn(side, count=None):
    for x in side.tensors[:count]:
        x.requires_grad_()


@pytest.mark.parametrize("numbers", [{}, NUMBERS], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("teacher", "group"),
    [
        *((teacher, None) for teacher in ("head", "logits", "ensemble", "probabilities")),
        *((teacher, GROUPS["a rank of 4"]) for teacher in ("head", "logits")),
    ],
)
@pytest.mark.parametrize("keywords", [{}, {"divergence": "jsd"}], ids=str)
def test_forward(kernel_backend, keywords, teacher, group, masked, numbers):
    """Nothing of the size of all logits is ever there, and only gradients stay."""
    student, other_side = sides(teacher, **numbers)
    learn(student)
    mask = torch.rand(N) < 0.7 if masked else None
    keywords = {**keywords, "mask": mask, "backend": kernel_backend, "group": group}
    watch = Watch(lambda: call(student, other_side, **keywords))
    gathered = OF_CHUNK * len(other_side.tensors) if masked and teacher != "head" else 0
    buffers = 2 * OF_CHUNK + gathered
    assert WEIGHT <= watch.kept <= WEIGHT + SMALL
    assert watch.peak <= WEIGHT + buffers + SMALL < LOGITS


@pytest.mark.parametrize("numbers", [{}, NUMBERS], ids=str)
@every_group
def test_forward_of_what_a_teacher_kept(kernel_backend, group, numbers):
    student, _ = sides("head", **numbers)
    learn(student)
    teacher = fastkd.TopK(*torch.randn(N, CLASSES).topk(8))
    keywords = {"chunk_size": CHUNK, "backend": kernel_backend, "group": group}
    watch = Watch(lambda: fastkd.soft_target_loss(student.of(student.tensors), teacher, **keywords))
    assert WEIGHT <= watch.kept <= WEIGHT + SMALL
    assert watch.peak <= WEIGHT + OF_CHUNK + 3 * SMALL < LOGITS


@pytest.mark.parametrize("which", ["student", "all", "none", "hidden"])
@every_group
def test_what_is_saved(kernel_backend, group, which):
    """Gradients where forward computed them, and else inputs: nothing of rows × classes."""
    student, teacher = sides("head")
    learn(student, 1 if which == "hidden" else None)
    if which == "all":
        learn(teacher)
    reduction = "none" if which == "none" else "sum"
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call(student, teacher, reduction=reduction, backend=kernel_backend, group=group)
    inputs = {x.untyped_storage().data_ptr() for x in (*student.tensors, *teacher.tensors)}
    new = [x for x in saved if x.untyped_storage().data_ptr() not in inputs]
    expected = {"student": [(N, H), (CLASSES, H)], "hidden": [(N, H)]}.get(which, [])
    assert [tuple(x.shape) for x in new] == expected
    assert len(saved) <= len(new) + len(inputs)


@pytest.mark.parametrize("numbers", [{}, NUMBERS], ids=str)
@pytest.mark.parametrize("which", ["student", "all", "none"])
@every_group
def test_backward(kernel_backend, group, which, numbers):
    """Where the loop runs once more, it takes as little as in forward."""
    student, teacher = sides("head", **numbers)
    learn(student)
    if which == "all":
        learn(teacher)
    reduction = "none" if which == "none" else "sum"
    loss = call(student, teacher, reduction=reduction, backend=kernel_backend, group=group)
    watch = Watch(lambda: loss.backward(torch.full_like(loss, 2.0)))
    gradients = WEIGHT * {"student": 0, "none": 1, "all": 2}[which]
    assert watch.peak <= gradients + 4 * OF_CHUNK + 2 * SMALL < LOGITS


@pytest.mark.parametrize("teacher", ["head", "logits"])
@pytest.mark.parametrize("chunk_size", [1, 3, 40, 1000])
@every_group
def test_masked_rows_are_not_multiplied(kernel_backend, group, chunk_size, teacher):
    """And a chunk has as many rows as it was told, but for the last."""
    student, other_side = sides(teacher)
    learn(student)
    mask = torch.rand(N) < 0.3
    count = int(mask.sum())
    keywords = {"mask": mask, "chunk_size": chunk_size, "backend": kernel_backend, "group": group}
    watch = Watch(lambda: call(student, other_side, **keywords))
    sizes = [min(chunk_size, count - start) for start in range(0, count, chunk_size)]
    to_logits = [shapes for shapes in watch.products if shapes[-1][1] == CLASSES]
    forward = [size for size in sizes for _ in range(2 if teacher == "head" else 1)]
    rows = [shapes[-1][0] for shapes in to_logits]
    assert rows == forward
    # Each chunk's gradient is multiplied twice: by the weight, and by the hidden states.
    assert len(watch.products) == len(forward) + 2 * len(sizes)


@every_group
def test_the_size_that_is_picked(kernel_backend, group, monkeypatch):
    student, teacher = sides("head")
    learn(student)
    monkeypatch.setattr(
        "fastkd.ops.linear_head_call.free_bytes", lambda device: 8 * 32 * 2 * CLASSES * 4
    )
    keywords = {"chunk_size": None, "backend": kernel_backend, "group": group}
    watch = Watch(lambda: call(student, teacher, **keywords))
    rows = {shapes[-1][0] for shapes in watch.products if shapes[-1][1] == CLASSES}
    assert rows == {32}
