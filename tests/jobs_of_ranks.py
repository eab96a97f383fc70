"""What processes do together in tests, each of them `job(rank, size, ...)`."""

import contextlib
import datetime
import functools
import time
import warnings
from types import SimpleNamespace

import pytest
import top_k
import torch
import torch.distributed as dist
from agreement_logits import check_distillation, check_soft_target, logits, some_labels
from divergences import sides
from linear_heads import NUMBERS, check_loss, head, labels_and_mask
from split import LOSSES, Processes, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd.compat import modelopt

F32 = torch.float32


@contextlib.contextmanager
def split():
    """The losses that are checked are those of this process and the others."""
    own = {name: getattr(fastkd, name) for name in LOSSES}
    try:
        for name in LOSSES:
            setattr(fastkd, name, whole(name, Processes()))
        yield
    finally:
        for name, function in own.items():
            setattr(fastkd, name, function)


def agrees(rank, size, backend, dtype, keywords):
    labels = some_labels(9, classes=100)
    mask, weight = torch.rand(9) < 0.7, torch.rand(9)
    heat = (1 + torch.rand(9)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    with split():
        pair = sides(9, 100, dtype, dtype, temperature=2.0)
        check_soft_target(*pair, backend, temperature=2.0, mask=mask, **keywords)
        pair = sides(9, 100, dtype, dtype, temperature=4.0)
        check_distillation(*pair, labels, backend, label_smoothing=0.1, **keywords)
        upstream, keywords = torch.randn(9), {**keywords, "reduction": "none"}
        check_distillation(*pair, labels, backend, row_weight=weight, **keywords)
        pair = sides(9, 100, dtype, dtype, temperature=heat)
        check_soft_target(*pair, backend, upstream, temperature=heat, **keywords)


def agrees_without_logits(rank, size, backend, dtype, keywords):
    """Linear heads, whose hidden states' gradients are the same on every process."""
    student, teacher = head((9,), 100, 8, dtype=dtype, **NUMBERS), head((9,), 100, 6, dtype=dtype)
    labels, mask = labels_and_mask((9,), 100)
    with split():
        of_call = {"chunk_size": 4, "mask": mask, **keywords}
        check_loss("soft_target_loss", student, teacher, backend, grad_output=1.7, **of_call)
        of_call = {**of_call, "labels": labels, "label_smoothing": 0.1, "reduction": "none"}
        heat = (1 + torch.rand(9)).to(torch.float64 if dtype == torch.float64 else torch.float32)
        check_loss("distillation_loss", student, teacher, backend, temperature=heat, **of_call)


def agrees_on_kept_classes(rank, size, backend, dtype, keywords):
    labels, heat = (
        some_labels(9, classes=100),
        1 + torch.rand(9).to(torch.promote_types(dtype, F32)),
    )
    keywords = {**keywords, "temperature": heat, "reduction": "none"}
    with split():
        tensors = top_k.sides(9, 100, 7, (dtype, dtype), **keywords)
        top_k.check_top_k(*tensors, backend, torch.randn(9), **keywords)
        check = functools.partial(top_k.check_top_k, *tensors, backend, torch.randn(9), labels)
        check(label_smoothing=0.1, mask=torch.rand(9) < 0.7, **keywords)


def takes_a_part_of_the_group(rank, size):
    """The classes lie on some of the processes, and their group is another one than all."""
    groups = [dist.new_group([0]), dist.new_group(list(range(1, size)))]
    group = groups[min(rank, 1)]
    student, teacher = logits(4, 12), logits(4, 12)
    expected = fastkd.soft_target_loss(student, teacher)
    part = [x.chunk(group.size(), -1)[group.rank()] for x in (student, teacher)]
    torch.testing.assert_close(fastkd.soft_target_loss(*part, group=group), expected)


def learns_alike(rank, size):
    """A few steps of a head whose classes are split are those of the whole head."""
    teacher = logits(16, 12)
    own = teacher.chunk(size, -1)[rank]
    _learn(rank, size, lambda module, hidden: module(hidden), teacher, own)


def learns_alike_without_logits(rank, size):
    """The same of linear heads, whose teacher kept some of all classes."""
    kept = fastkd.TopK(*logits(16, 12).topk(5))

    def of(module, hidden):
        return fastkd.LinearHead(hidden, module.weight, module.bias)

    _learn(rank, size, of, kept, kept)


def _learn(rank, size, student_of, teacher, own):
    """The whole head learns from the teacher, and this process's part of it from its own."""
    hidden, labels = torch.randn(16, 8), some_labels(16, classes=12)
    whole_head, head = nn.Linear(8, 12), nn.Linear(8, 12 // size)
    with torch.no_grad():
        head.weight.copy_(whole_head.weight.chunk(size)[rank])
        head.bias.copy_(whole_head.bias.chunk(size)[rank])
    inputs = []
    for module, target, keywords in (
        (whole_head, teacher, {}),
        (head, own, {"group": dist.group.WORLD}),
    ):
        optimizer, x = torch.optim.SGD(module.parameters(), lr=0.5), hidden.clone()
        for _ in range(5):
            optimizer.zero_grad()
            loss = fastkd.distillation_loss(
                student_of(module, x.requires_grad_()), target, labels, **keywords
            )
            loss.backward()
            optimizer.step()
        inputs.append(x.grad)
    torch.testing.assert_close(head.weight, whole_head.weight.chunk(size)[rank])
    if isinstance(student_of(head, hidden), fastkd.LinearHead):
        torch.testing.assert_close(*inputs)


def explains_alone(rank, size):
    """No other rank need take part."""
    if rank == 0:
        call = fastkd.soft_target_loss, logits(4, 6), logits(4, 6)
        assert fastkd.explain(*call, group=dist.group.WORLD).chosen == "native"
        side = fastkd.LinearHead(logits(4, 3), logits(6, 3))
        explanation = fastkd.explain(call[0], side, side, group=dist.group.WORLD)
        assert explanation.chosen == "native"
        assert "the ranks take the least" in explanation.notes[0]
        call = fastkd.soft_target_loss, logits(4, 6), [logits(4, 6)] * 2
        explanation = fastkd.explain(*call, group=dist.group.WORLD)
        assert explanation.chosen == "reference"
        assert "ensembles and probabilities are for the reference" in explanation.reasons["native"]
    dist.barrier()


def raises_everywhere(rank, size):
    student, teacher = logits(4, 6), logits(4, 6)
    start = time.monotonic()
    if rank == size - 1:
        with pytest.raises(ValueError, match="must have the same shape"):
            fastkd.soft_target_loss(student, teacher[:3], group=dist.group.WORLD)
    else:
        with pytest.raises(RuntimeError, match=f"rank {size - 1} of the group raised an error"):
            fastkd.soft_target_loss(student, teacher, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="got rows"):
        rows = 4 - (rank == 0)
        fastkd.soft_target_loss(student[:rows], teacher[:rows], group=dist.group.WORLD)
    assert time.monotonic() - start < 10
    # And the group is as good as before.
    assert fastkd.soft_target_loss(student, teacher, group=dist.group.WORLD).isfinite()


def waits_no_longer_than_the_group(rank, size):
    """For a rank that does not come."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    start = time.monotonic()
    if rank:
        with pytest.raises(RuntimeError):
            fastkd.soft_target_loss(logits(4, 6), logits(4, 6), group=group)
    assert time.monotonic() - start < 20
    dist.barrier()


def compiles_around(rank, size):
    """Compiled code stops at the loss; as one graph it raises, and says what to do."""

    def step(student):
        return fastkd.soft_target_loss(2 * student, teacher, group=dist.group.WORLD) * 3

    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6)
    expected = step(student)
    found = torch.compile(step, backend="aot_eager")(student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, student), torch.autograd.grad(expected, student)
    )
    torch._dynamo.reset()
    with pytest.raises(Exception, match="disable"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(student)


def takes_dtensors(rank, size, name, dim, classes, keywords):
    """Sharded on the classes, as torch shards them; kernels compute what each rank has."""
    mesh = init_device_mesh("cpu", (size,))
    shape = (4, classes) if dim == 1 else (classes, 4)
    tensors = [logits(*shape), logits(*shape)]
    if name == "distillation_loss":
        keywords = {
            **keywords,
            "labels": some_labels(4, classes=keywords.get("num_classes", classes)),
        }
    plain = [x.clone().requires_grad_() for x in tensors]
    heat = torch.tensor(2.0, requires_grad=True)
    call = getattr(fastkd, name)
    expected = call(*plain, temperature=heat, dim=dim, **keywords)
    expected.sum().backward()
    leaves = [distribute_tensor(x, mesh, [Shard(dim)]).requires_grad_() for x in tensors]
    given = {
        k: distribute_tensor(v, mesh, [Replicate()]) if torch.is_tensor(v) else v
        for k, v in keywords.items()
    }
    of_ranks = distribute_tensor(heat.detach(), mesh, [Replicate()]).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastkd.FallbackWarning)
        loss = call(*leaves, temperature=of_ranks, dim=dim, **given)
    assert isinstance(loss, DTensor)
    loss.sum().backward()
    torch.testing.assert_close(loss.full_tensor(), expected)
    for x, y in zip(leaves, plain, strict=True):
        assert x.grad.placements == (Shard(dim),)
        torch.testing.assert_close(x.grad.full_tensor(), y.grad)
    torch.testing.assert_close(of_ranks.grad.full_tensor(), heat.grad)
    explanation = fastkd.explain(call, *leaves, dim=dim, **given)
    assert explanation.chosen == "native"


def takes_dtensors_of_kept_classes(rank, size, tail):
    """The student's are sharded on the classes, and the slots the same on every rank."""
    mesh = init_device_mesh("cpu", (size,))
    student, values, indices, lse = top_k.sides(4, 10, 3, (F32, F32), tail=tail)
    labels = some_labels(4, classes=10)
    plain = [x.clone().requires_grad_() for x in (student, values)]
    teacher = fastkd.TopK(plain[1], indices, tail=tail, lse=lse)
    expected = fastkd.distillation_loss(plain[0], teacher, labels)
    expected.backward()
    same = [Replicate()]
    placed = [(student, [Shard(1)]), (values, same)]
    leaves = [distribute_tensor(x, mesh, at).requires_grad_() for x, at in placed]
    indices, labels = (distribute_tensor(x, mesh, same) for x in (indices, labels))
    lse = None if lse is None else distribute_tensor(lse, mesh, same)
    teacher = fastkd.TopK(leaves[1], indices, tail=tail, lse=lse)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastkd.FallbackWarning)
        loss = fastkd.distillation_loss(leaves[0], teacher, labels)
    loss.backward()
    torch.testing.assert_close(loss.full_tensor(), expected)
    for x, y in zip(leaves, plain, strict=True):
        torch.testing.assert_close(x.grad.full_tensor(), y.grad)
    call = fastkd.distillation_loss, leaves[0], teacher, labels
    assert fastkd.explain(*call).chosen == "native"


def takes_a_mesh_of_two_dimensions(rank, size):
    """One of which has the classes, and along the other all have the same."""
    mesh = init_device_mesh("cpu", (2, size // 2))
    student, teacher = logits(4, 10), logits(4, 10)
    expected = fastkd.soft_target_loss(student, teacher)
    split = [distribute_tensor(x, mesh, [Replicate(), Shard(1)]) for x in (student, teacher)]
    torch.testing.assert_close(fastkd.soft_target_loss(*split).full_tensor(), expected)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


def of_data(size):
    """Tokens, a teacher's logits, and labels of unequal numbers of kept rows a rank."""
    x, teacher = torch.randn(size * 12, 6), logits(size * 12, 10)
    labels = some_labels(size * 12, classes=10)
    labels[:7] = -100
    return x, teacher, labels


def trains_on_all_data(rank, size, kind):
    """The recipe of docs/usage.md: losses and gradients are those of one process."""
    x, teacher, labels = of_data(size)
    alone = Student()
    expected = fastkd.distillation_loss(alone(x), teacher, labels)
    expected.backward()

    model = Student()
    model.load_state_dict(alone.state_dict())
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    x, teacher, labels = (t.chunk(size)[rank] for t in (x, teacher, labels))
    tokens = (labels != -100).sum()
    dist.all_reduce(tokens)
    loss = fastkd.distillation_loss(model(x), teacher, labels, normalizer=tokens / size)
    loss.backward()

    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / size, expected.detach())
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    for own, other in pairs:
        gradient = own.grad.full_tensor() if isinstance(own.grad, DTensor) else own.grad
        torch.testing.assert_close(gradient, other.grad)


def takes_model_optimizer_s_losses(rank, size):
    """Each rank has the losses that one process has, and its part of the gradient."""
    config, group = SimpleNamespace(tensor_model_parallel_size=size), dist.group.WORLD
    sides = [torch.randn(5, 2, size * 8, dtype=torch.float64) for _ in range(2)]
    for name, keywords in [
        ("LogitsKLLoss", {}),
        ("LogitsKLLoss", {"reverse": True}),
        ("TopLogitsKLLoss", {"top_k": 11}),
        ("TopLogitsKLLoss", {"top_k": 5, "top_p": 0.2, "reverse": True}),
        ("TopKLogitsKLLoss", {"top_k": 5}),
    ]:
        results = []
        for of, given in [(None, {}), (config, {"group": group})]:
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                criterion = getattr(modelopt, name)(of, 2.0, **keywords, **given)
            student, teacher = (x.chunk(size, -1)[rank] if given else x for x in sides)
            student = student.clone().requires_grad_()
            loss, _, _ = criterion(student, teacher.contiguous())
            (gradient,) = torch.autograd.grad(loss.square().sum(), student)
            results.append((loss, gradient if given else gradient.chunk(size, -1)[rank]))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
