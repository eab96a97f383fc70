"""`nn.HintLoss` calls its regressor, unless that is the plain 1×1 convolution that it began as."""

import functools
import os

import pytest
import torch
from conftest import DEVICE
from torch.nn.utils import parametrizations, prune

import fastkd

IN, OUT = 4, 8
SPATIAL = (5, 6)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def convolution(**keywords):
    return torch.nn.Conv2d(IN, OUT, 1, **keywords)


def hooked(register):
    module = convolution()
    register(module)
    return module


class Subclass(torch.nn.Conv2d):
    def forward(self, features):
        return super().forward(features) * 3


class Adapter(torch.nn.Module):
    """As LoRA has it: what was there, and a product of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = torch.nn.Conv2d(2, base.out_channels, 1, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, features):
        return self.base(features) + self.up(self.down(features))


def replaced_forward():
    module = convolution()
    plain = module.forward
    module.forward = lambda features: plain(features).relu()
    return module


def pruned_bias():
    return prune.random_unstructured(convolution(), "bias", amount=3)


CONVOLUTIONS = {
    "spectral_norm hook": lambda: torch.nn.utils.spectral_norm(convolution()),
    "spectral_norm": lambda: parametrizations.spectral_norm(convolution()),
    "weight_norm hook": lambda: torch.nn.utils.weight_norm(convolution()),
    "weight_norm": lambda: parametrizations.weight_norm(convolution()),
    "prune": lambda: prune.l1_unstructured(convolution(), "weight", amount=0.5),
    "prune of the bias": pruned_bias,
    "forward hook": lambda: hooked(lambda m: m.register_forward_hook(lambda _, x, y: y * 2)),
    "forward pre-hook": lambda: hooked(
        lambda m: m.register_forward_pre_hook(lambda _, x: (x[0] + 1,))
    ),
    "full backward hook": lambda: hooked(
        lambda m: m.register_full_backward_hook(lambda _, to_input, g: (to_input[0] * 2,))
    ),
    "full backward pre-hook": lambda: hooked(
        lambda m: m.register_full_backward_pre_hook(lambda _, g: (g[0] * 2,))
    ),
    "replaced forward": replaced_forward,
    "subclass": lambda: Subclass(IN, OUT, 1),
}
OTHERS = {
    "adapter": lambda: Adapter(convolution()),
    "groups": lambda: convolution(groups=2),
    "circular": lambda: torch.nn.Conv2d(IN, OUT, 3, padding=1, padding_mode="circular"),
    "3x3 with batch norm": lambda: torch.nn.Sequential(
        torch.nn.Conv2d(IN, OUT, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(OUT),
        torch.nn.ReLU(),
    ),
}
REGRESSORS = {**CONVOLUTIONS, **OTHERS}


def twins(make, **keywords):
    """A loss with this regressor, and the same regressor once more."""
    seed = torch.initial_seed()
    module = fastkd.nn.HintLoss(IN, OUT, **keywords)
    torch.manual_seed(seed)
    module.regressor = make()
    torch.manual_seed(seed)
    return module, make()


def features(channels=IN, spatial=SPATIAL):
    return torch.randn(3, channels, *spatial)


def compare_training(module, regressor, by_hand, sides):
    """Several steps of an optimizer: the same losses, gradients and parameters."""
    students, teachers = sides
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (module, regressor)]
    before = [p.detach().clone() for p in module.parameters()]
    for _ in range(4):
        leaves, others = ([x.clone().requires_grad_() for x in students] for _ in range(2))
        loss, expected = module(leaves, teachers), by_hand(regressor, others, teachers)
        torch.testing.assert_close(loss, expected)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        expected.backward()
        pairs = zip(
            [*leaves, *module.parameters()], [*others, *regressor.parameters()], strict=True
        )
        for one, other in pairs:
            assert one.grad.any()
            torch.testing.assert_close(one.grad, other.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert all((p != b).any() for p, b in zip(module.parameters(), before, strict=True))


def by_hand(regressor, students, teachers, **keywords):
    return fastkd.hint_loss([regressor(x) for x in students], teachers, **keywords)


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor_that_is_no_plain_convolution_is_called(backend, name):
    module, regressor = twins(REGRESSORS[name], backend=backend)
    hand = functools.partial(by_hand, backend=backend)
    sides = [features(), features()], [features(OUT), features(OUT)]
    compare_training(module, regressor, hand, sides)


@pytest.mark.parametrize("name", REGRESSORS)
def test_one_tensor(backend, name):
    keywords = {"reduction": "none", "half": False, "backend": backend}
    module, regressor = twins(REGRESSORS[name], **keywords)
    student, teacher = features(), features(OUT)
    torch.testing.assert_close(
        module(student, teacher), fastkd.hint_loss(regressor(student), teacher, **keywords)
    )


@pytest.mark.parametrize("spatial", [(), (7,), (2, 3, 4), (2, 3)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_take_any_number_of_dimensions(backend, name, spatial):
    module, regressor = twins(CONVOLUTIONS[name], backend=backend)
    student, teacher = features(spatial=spatial), features(OUT, spatial)
    columns = regressor(student.reshape(3, IN, student[0, 0].numel(), 1))
    torch.testing.assert_close(
        module(student, teacher),
        fastkd.hint_loss(columns.reshape(teacher.shape), teacher, backend=backend),
    )


@pytest.mark.parametrize("name", REGRESSORS)
def test_empty_batch(backend, name):
    module, _ = twins(REGRESSORS[name], backend=backend)
    module.eval()
    student = torch.randn(0, IN, *SPATIAL, requires_grad=True)
    loss = module(student, torch.randn(0, OUT, *SPATIAL))
    loss.backward()
    assert loss == 0


def test_a_regressor_of_another_kind_gets_the_features_as_they_are():
    module = fastkd.nn.HintLoss(IN, OUT)
    module.regressor = torch.nn.Linear(IN, OUT)
    student, teacher = torch.randn(3, 7, IN), torch.randn(3, 7, OUT)
    torch.testing.assert_close(
        module(student, teacher), fastkd.hint_loss(module.regressor(student), teacher)
    )


KINDS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_once_a_feature(kind, everywhere, count):
    module = fastkd.nn.HintLoss(IN, OUT)
    calls = []

    def hook(owner, *_):
        calls.append(owner)

    if everywhere:
        handle = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")(hook)
    else:
        handle = getattr(module.regressor, f"register_{kind}_hook")(hook)
    try:
        for _ in range(2):
            calls.clear()
            students = [features().requires_grad_() for _ in range(count)]
            module(students, [features(OUT) for _ in range(count)]).backward()
            assert calls.count(module.regressor) == count
    finally:
        handle.remove()


@pytest.fixture
def taken(monkeypatch):
    """The weights that reach `hint_loss`."""
    weights = []

    def recorded(*args, regressor_weight=None, **keywords):
        weights.append(regressor_weight)
        return fastkd.hint_loss(*args, regressor_weight=regressor_weight, **keywords)

    monkeypatch.setattr(fastkd.nn.hint, "hint_loss", recorded)
    return weights


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_convolution_is_not_called(backend, monkeypatch, taken, bias):
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("it was called"))
    module = fastkd.nn.HintLoss(IN, OUT, bias=bias, backend=backend)
    module(features(), features(OUT)).backward()
    module([features()] * 2, [features(OUT)] * 2).backward()
    assert [w is module.regressor.weight for w in taken] == [True, True]
    assert all(p.grad.any() for p in module.parameters())


def test_it_is_plain_again_without_its_hook(taken):
    module = fastkd.nn.HintLoss(IN, OUT)
    sides = features(), features(OUT)
    handle = module.regressor.register_forward_hook(lambda *_: None)
    module(*sides)
    handle.remove()
    module(*sides)
    prune.l1_unstructured(module.regressor, "weight", amount=0.5)
    module(*sides)
    prune.remove(module.regressor, "weight")
    module(*sides)
    assert [w is not None for w in taken] == [False, True, False, True]


@pytest.mark.parametrize("name", REGRESSORS)
def test_the_weight_of_another_regressor_is_not_looked_at(taken, name):
    module, _ = twins(REGRESSORS[name])
    module(features(), features(OUT))
    assert taken == [None]


def test_parameters_replaced_for_one_call(backend):
    module = fastkd.nn.HintLoss(IN, OUT, backend=backend)
    sides = features(), features(OUT)
    weight, bias = torch.randn(OUT, IN, 1, 1), torch.randn(OUT)
    replaced = torch.func.functional_call(
        module, {"regressor.weight": weight, "regressor.bias": bias}, sides
    )
    expected = fastkd.hint_loss(
        *sides, regressor_weight=weight, regressor_bias=bias, backend=backend
    )
    torch.testing.assert_close(replaced, expected)


@pytest.mark.parametrize("name", ["subclass", "adapter", "forward hook"])
def test_under_autocast_a_called_regressor_computes_as_modules_do(backend, name):
    module, regressor = twins(REGRESSORS[name], backend=backend)
    student, teacher = features(), features(OUT)
    with torch.autocast(student.device.type, dtype=torch.bfloat16):
        projected = regressor(student)
        assert projected.dtype == torch.bfloat16
        loss = module(student, teacher)
    torch.testing.assert_close(loss, fastkd.hint_loss(projected, teacher, backend=backend))


@pytest.mark.parametrize("make", [convolution, CONVOLUTIONS["forward hook"], OTHERS["adapter"]])
def test_errors_are_the_function_s(make):
    module, _ = twins(make)
    good = features(), features(OUT)
    for student, teacher, error, words in [
        ("features", good[1], TypeError, "student must be a tensor, got str"),
        ([good[0]], good[1], TypeError, "list and Tensor"),
        (good[0].long(), good[1], TypeError, "int64"),
        ([good[0]], [good[1]] * 2, ValueError, "same number"),
        (good[0], good[1][:1], ValueError, r"\(1, 8, 5, 6\)"),
        (torch.randn(IN), torch.randn(OUT), ValueError, r"student must be \(B, C, \*spatial\)"),
    ]:
        if make is OTHERS["adapter"] and "spatial" in words:
            continue
        with pytest.raises(error, match=words):
            module(student, teacher)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [None, "spectral_norm", "weight_norm", "forward hook", "adapter"])
def test_compiled(backend, name):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    module, twin = twins(REGRESSORS.get(name, convolution), backend=backend)
    expected = fastkd.nn.HintLoss(IN, OUT, backend=backend)
    expected.regressor = twin
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for half in (True, False):
        module.half = expected.half = half
        student, teacher = features().requires_grad_(), features(OUT)
        losses = compiled(student, teacher), expected(student, teacher)
        torch.testing.assert_close(*losses)
        gradients = (
            torch.autograd.grad(loss, [student, *m.parameters()])
            for loss, m in zip(losses, (module, expected), strict=True)
        )
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
def test_a_hook_that_comes_after_compilation(backend):
    """Where torch looks for new hooks at all: by default compiled code does not, in any module."""
    torch._dynamo.reset()
    module = fastkd.nn.HintLoss(IN, OUT, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    sides = features(), features(OUT)
    torch.testing.assert_close(compiled(*sides), module(*sides))
    module.regressor.register_forward_hook(lambda _, x, y: y * 2)
    torch.testing.assert_close(compiled(*sides), module(*sides))
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [convolution, CONVOLUTIONS["forward hook"], OTHERS["adapter"]])
def test_export(kernel_backend, make):
    module, _ = twins(make, backend=kernel_backend)
    sides = features(), features(OUT)
    program = torch.export.export(module, sides)
    torch.testing.assert_close(program.module()(*sides), module(*sides))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="one process group on the CPU says all")
@pytest.mark.parametrize("make", [convolution, OTHERS["3x3 with batch norm"]])
@pytest.mark.parametrize("whole", [False, True])
def test_sharded(backend, process_group, make, whole):
    """The regressor by itself, or the loss with it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    module, regressor = twins(make, backend=backend)
    fully_shard(module if whole else module.regressor, mesh=init_device_mesh("cpu", (1,)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (module, regressor)]
    student, teacher = features(), features(OUT)
    for _ in range(4):
        losses = module(student, teacher), by_hand(regressor, [student], [teacher])
        torch.testing.assert_close(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for one, other in zip(module.parameters(), regressor.parameters(), strict=True):
            torch.testing.assert_close(one.grad.full_tensor(), other.grad)
            torch.testing.assert_close(one.full_tensor(), other)
