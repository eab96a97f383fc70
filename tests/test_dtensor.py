"""DTensors, whose values lie on several ranks, go to the reference: two processes try each loss.

Before torch 2.13, which splits not all that losses consist of, they are refused.
"""

import functools
import socket

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from calls import LOSSES, OF_ROWS, sample, variants
from conftest import SEED
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fastkd

pytestmark = pytest.mark.filterwarnings("ignore::fastkd.FallbackWarning")

RANKS = 2
IS_NEW = torch.__version__ >= "2.13"
REFUSAL = r"DTensors need torch 2\.13 or newer, got 2.*to_local"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def placements(name):
    """Samples and classes; features are split by samples alone: torch has its limits there."""
    on_logits = name in ("soft_target_loss", "distillation_loss")
    return [Replicate(), Shard(0), *([Shard(1)] if on_logits else [])]


def compare(call, mesh, placement):
    leaves = [distribute_tensor(x, mesh, [placement]).requires_grad_() for x in call.tensors]
    keywords = dict(call.keywords)
    # In one order on all ranks, for each of these is sent from one rank to the others.
    for name in [n for n in OF_ROWS if n in keywords]:
        of_rows = Replicate() if placement == Shard(1) else placement
        keywords[name] = distribute_tensor(keywords[name], mesh, [of_rows])
    loss = call(*leaves, **keywords)
    loss.sum().backward()
    plain = call.leaves()
    expected = call(*plain, backend="reference")
    expected.sum().backward()
    torch.testing.assert_close(loss.full_tensor(), expected)
    for x, y in zip(leaves, plain, strict=True):
        torch.testing.assert_close(x.grad.full_tensor(), y.grad)


def compare_metrics(mesh, placement):
    tensors = torch.randn(4, 10), torch.randn(4, 10)
    mask = torch.tensor([True, False, True, True])
    of_rows = Replicate() if placement == Shard(1) else placement
    found = fastkd.distillation_metrics(
        *[distribute_tensor(x, mesh, [placement]) for x in tensors],
        mask=distribute_tensor(mask, mesh, [of_rows]),
    )
    expected = fastkd.distillation_metrics(*tensors, mask=mask, backend="reference")
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value.full_tensor(), wanted)


def on_each_rank(rank, port):
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=RANKS)
    torch.manual_seed(SEED)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in LOSSES:
        for placement in placements(name):
            for call in variants(name):
                compare(call, mesh, placement)
    for placement in (Shard(0), Shard(1), Replicate()):
        compare_metrics(mesh, placement)
    torch.distributed.destroy_process_group()


@pytest.mark.thorough
def test_the_losses_of_dtensors():
    if IS_NEW:
        torch.multiprocessing.spawn(on_each_rank, (free_port(),), nprocs=RANKS)
    else:
        with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=REFUSAL):
            torch.multiprocessing.spawn(on_each_rank, (free_port(),), nprocs=RANKS)


@pytest.fixture
def mesh():
    """Of this process alone."""
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group("gloo", address, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_said_of_them(mesh, kernel_backend, name):
    call = sample(name)
    tensors = [distribute_tensor(x, mesh, [Shard(0)]) for x in call.tensors]
    keywords = dict(call.keywords)
    if "labels" in keywords:
        keywords["labels"] = distribute_tensor(keywords["labels"], mesh, [Shard(0)])
    if not IS_NEW:
        for refused in (call.function, functools.partial(fastkd.explain, call.function)):
            with pytest.raises(NotImplementedError, match=REFUSAL):
                refused(*tensors, **keywords)
        return
    explanation = fastkd.explain(call.function, *tensors, **keywords)
    assert explanation.chosen == "reference"
    assert "DTensor" in explanation.reasons["native"]
    with pytest.warns(fastkd.FallbackWarning, match="DTensor"):
        call(*tensors, **keywords)
    with pytest.raises(fastkd.BackendUnavailableError, match="DTensor"):
        call(*tensors, **keywords, backend=kernel_backend)


@pytest.mark.parametrize("name", [n for n in LOSSES if len(sample(n).tensors) > 1])
def test_a_dtensor_beside_an_ordinary_tensor(mesh, backend, name):
    call = sample(name)
    first = distribute_tensor(call.tensors[0], mesh, [Replicate()])
    with pytest.raises(TypeError, match=r"must all be DTensors or none, got \['DTensor', 'Tensor'"):
        call(first, *call.tensors[1:], backend=backend)


@pytest.mark.parametrize("name", ["soft_target_loss", "hint_loss"])
def test_compiled(mesh, name):
    call = sample(name)
    tensors = [distribute_tensor(x, mesh, [Shard(0)]) for x in call.tensors]
    torch._dynamo.reset()
    compiled = torch.compile(getattr(fastkd, name), fullgraph=True, backend="aot_eager")
    if not IS_NEW:
        with pytest.raises(Exception, match=REFUSAL):
            compiled(*tensors, **call.keywords)
        return
    torch.testing.assert_close(compiled(*tensors, **call.keywords).full_tensor(), call())
