"""Calls with a teacher that kept k classes over ranks: errors, operators, memory."""

import pytest
import torch
from agreement_logits import logits, some_labels
from calls import Recorder
from conftest import DEVICE
from divergences import name_of
from split import Threads
from top_k import PAIRS, kept, sides

import fastkd

every_pair = pytest.mark.parametrize("keywords", PAIRS, ids=name_of)


def call_of(keywords, rows=4, classes=10, k=3):
    """Tensors, and the keywords of the loss."""
    student, *slots = sides(rows, classes, k, (torch.float32,) * 2, **keywords)
    teacher = kept(*slots, tail=keywords["tail"])
    return student, teacher, {n: x for n, x in keywords.items() if n != "tail"}


def test_an_index_that_is_no_class(backend):
    """Of all ranks' classes; the error has these."""
    student, teacher, _ = call_of({"tail": "renormalize"})
    teacher.indices[1, 1] = 20

    def on_rank(rank, group):
        call = {"group": group, "backend": backend, "reduction": "none"}
        if student.device.type == "cpu":
            with pytest.raises(ValueError, match=r"indices must lie in \[0, 19\], .* got 20"):
                fastkd.soft_target_loss(student, teacher, **call)
        elif backend != "reference":  # there torch's own assertion reports it
            found = fastkd.soft_target_loss(student, teacher, **call)
            assert found.isnan().tolist() == [False, True, False, False]

    Threads(2).run(on_rank)


@pytest.mark.parametrize(
    ("teacher_of", "message"),
    [
        (lambda teacher, rank: kept(*(x[:, rank:] for x in (teacher.values, teacher.indices))),
         r"got slots \(\d, False\) on rank"),
        (lambda teacher, rank: kept(teacher.values, teacher.indices,
                                    tail=["renormalize", "renormalize_both"][rank]),
         r"got slots \(3, (True|False)\) on rank"),
        (lambda teacher, rank: teacher if rank else torch.zeros(4, 10), "got (divergence|slots)"),
    ],
)  # fmt: skip
def test_every_rank_raises(teacher_of, message):
    student, teacher, _ = call_of({"tail": "renormalize"})

    def on_rank(rank, group):
        with pytest.raises(ValueError, match=message):
            fastkd.soft_target_loss(student, teacher_of(teacher, rank), group=group)

    Threads(2).run(on_rank)


def test_a_second_derivative_of_kernels_raises(kernel_backend):
    student, teacher, _ = call_of({"tail": "renormalize"})

    def on_rank(rank, group):
        s = student.clone().requires_grad_()
        loss = fastkd.soft_target_loss(s, teacher, group=group, backend=kernel_backend)
        (first,) = torch.autograd.grad(loss, s, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated only once"):
            first.sum().backward()

    Threads(2).run(on_rank)


@every_pair
def test_operators_pass_opcheck(kernel_backend, keywords):
    """And have fakes."""
    student, teacher, others = call_of(keywords)
    teacher.indices.clamp_(max=6)
    teacher.values.requires_grad_()
    labels, calls = torch.tensor([0, 6, -100, 3]), []
    call = {"backend": kernel_backend, "num_classes": 7, "label_smoothing": 0.1, **others}

    def on_rank(rank, group):
        with Recorder() as recorder:
            fastkd.distillation_loss(
                student.clone().requires_grad_(), teacher, labels, group=group, **call
            ).backward()
        calls.extend(recorder.calls)

    Threads(1).run(on_rank)
    names = {str(function) for function, _ in calls}
    assert names >= {
        f"fastkd.top_k_{name}.default" for name in ("sums", "shard_forward", "shard_backward")
    }
    for function, args in calls:
        torch.library.opcheck(function, args)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the memory of a CPU's operators")
@every_pair
def test_memory_beside_the_gradient(keywords):
    """A step allocates that of the classes here, and otherwise numbers of rows and slots."""
    student, teacher, others = call_of(keywords, rows=64, classes=4000)
    labels = some_labels(64, classes=4000)

    def on_rank(rank, group):
        s = student.requires_grad_()
        with torch.profiler.profile(profile_memory=True) as profile:
            call = {"group": group, "backend": "native", **others}
            fastkd.distillation_loss(s, teacher, labels, **call).backward()
        return [event.self_cpu_memory_usage for event in profile.events()]

    (sizes,) = Threads(1).run(on_rank)
    assert [size for size in sizes if size > 40_000] == [student.numel() * 4]


def test_kernels_serve_without_a_warning(kernel_backend):
    student, teacher, _ = call_of({"tail": "renormalize"})

    def on_rank(rank, group):
        call = fastkd.soft_target_loss, student, teacher
        found = fastkd.explain(*call, group=group, backend=kernel_backend)
        assert found.chosen == kernel_backend
        other = fastkd.explain(fastkd.soft_target_loss, student, [logits(4, 10)] * 2, group=group)
        assert "the classes that it kept" in other.reasons[kernel_backend]

    Threads(2).run(on_rank)
