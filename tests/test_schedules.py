"""Numbers that change from step to step, as schedules do, under torch.compile.

The first value is compiled as a constant and the second as a symbol that serves all others. Torch
2.8 has no such symbol for a number that is multiplied by another before it meets a tensor: there
the weight of the soft targets, the teachers' and those of pairs that multiply a number of the loss
are compiled anew for each value.
"""

import functools

import numpy as np
import pytest
import torch
from calls import sample, variants
from torch._dynamo.backends.registry import lookup_backend

import fastkd

pytestmark = [pytest.mark.usefixtures("fresh_compiler"), pytest.mark.thorough]

STEPS = 12
# A constant and a symbol; and one more for a value that switches something off.
MOST_GRAPHS = 3

# Every float argument of every loss, and between what values it goes.
SCHEDULES = {
    "soft_target_loss": {"temperature": (1, 8), "teacher_temperature": (2, 5)},
    "distillation_loss": {
        "temperature": (8, 1),
        "soft_weight": (0.05, 1),
        "hard_weight": (1, 0),
        "label_smoothing": (0, 1),
    },
    "attention_map": {"p": (1, 4), "eps": (1e-12, 2)},
    "attention_transfer_loss": {
        "p": (4, 1), "order": (1, 5), "beta": (0, 1e3), "eps": (2, 1e-12),
    },
    "rkd_distance_loss": {"delta": (0.05, 2)},
    "rkd_angle_loss": {"delta": (2, 0.05)},
}  # fmt: skip
WEIGHTED = [
    "attention_transfer_loss",
    "hint_loss",
    "similarity_preserving_loss",
    "fsp_loss",
]
ARGUMENTS = [(name, argument) for name, bounds in SCHEDULES.items() for argument in bounds]


def values(bounds, steps=STEPS):
    """Fresh ones between the bounds, in order, and the bounds themselves where there is room."""
    low, high = bounds
    rng = np.random.default_rng(torch.initial_seed() % 2**63)
    shares = np.sort(rng.uniform(0.05, 0.95, size=steps))
    if steps == STEPS:
        shares[0], shares[-1] = 0, 1
    return [float(low + (high - low) * share) for share in shares]


class Counter:
    """A compiler's backend that counts its graphs, forward and backward together being one."""

    def __init__(self, name):
        self.graphs = 0
        self.backend = lookup_backend(name)

    def __call__(self, graph, inputs):
        # Torch may break off, and begin anew, where a symbol turns out to be a constant.
        compiled = self.backend(graph, inputs)
        self.graphs += 1
        return compiled


def follow(call, schedules, compiler="aot_eager", students_only=False):
    """The compiled loss and its gradients against eager ones at each step; returns the graphs."""
    counter = Counter(compiler)
    compiled = torch.compile(call.function, fullgraph=True, backend=counter)
    for step in zip(*schedules.values(), strict=True):
        keywords = {**call.keywords, **dict(zip(schedules, step, strict=True))}
        results = []
        for function in (compiled, call.function):
            count = call.students if students_only else len(call.tensors)
            leaves = [x.clone().requires_grad_(i < count) for i, x in enumerate(call.tensors)]
            loss = function(*leaves, **keywords)
            gradients = torch.autograd.grad(loss.sum(), leaves[:count])
            results.append((loss, *gradients))
        assert_same(*results)
    return counter.graphs


def assert_same(actual, expected):
    """The gradients in the L2 norm, within what is promised of two implementations."""
    torch.testing.assert_close(actual[0], expected[0], rtol=2e-5, atol=1e-6)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert a.dtype == e.dtype
        limit = {torch.float32: 6e-6, torch.float64: 2e-12}.get(e.dtype, torch.finfo(e.dtype).eps)
        assert (a - e).double().norm() <= limit * e.double().norm()


@functools.cache
def torch_multiplies_symbols():
    counter = Counter("aot_eager")
    compiled = torch.compile(lambda x, number: x * (3 * number), backend=counter)
    for number in (0.1, 0.2, 0.3, 0.4):
        compiled(torch.ones(2), number)
    return counter.graphs == 2


def multiplies(call, name):
    """Whether a weight of this call is multiplied by another number before it meets a tensor."""
    if name == "distillation_loss":
        return call.keywords["backend"] != "reference"
    weighs_pairs = name in ("attention_transfer_loss", "hint_loss")
    return weighs_pairs and "pair_weights" in call.keywords


def follow_or_raise(call, schedules, is_multiplied):
    """With so many values torch gives up where each is compiled anew, and says so."""
    if is_multiplied and not torch_multiplies_symbols():
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            follow(call, schedules)
    else:
        assert follow(call, schedules) <= MOST_GRAPHS


def graphs(call, name):
    """Of a schedule of three values."""
    return 3 if multiplies(call, name) and not torch_multiplies_symbols() else 2


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_one_argument(backend, name, argument):
    call = sample(name)
    call.keywords["backend"] = backend
    schedule = {argument: values(SCHEDULES[name][argument])}
    follow_or_raise(call, schedule, argument == "soft_weight" and multiplies(call, name))


def together(call, name):
    """Schedules of all arguments that go with the call's other keywords."""
    fixed = {"mse": {"order"}, "sum": {"p"}}
    excluded = call.refused.union(
        *(fixed.get(call.keywords.get(of), set()) for of in ("distance", "kind"))
    )
    return {
        argument: values(bounds, 3)
        for argument, bounds in SCHEDULES[name].items()
        if argument not in excluded
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_arguments(backend, name):
    for call in variants(name):
        call.keywords["backend"] = backend
        assert follow(call, together(call, name)) == graphs(call, name)
        torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEDULES)
def test_student_alone(kernel_backend, name, dtype):
    """The path on which forward already computes the gradient."""
    call = sample(name, dtype)
    call.keywords["backend"] = kernel_backend
    schedules = together(call, name)
    assert follow(call, schedules, students_only=True) == graphs(call, name)


@pytest.mark.parametrize("name", SCHEDULES)
def test_inductor(backend, name):
    call = sample(name)
    call.keywords["backend"] = backend
    assert follow(call, together(call, name), "inductor") == graphs(call, name)


def test_parts(backend):
    call = sample("distillation_loss")
    call.keywords.update(return_parts=True, backend=backend)
    counter = Counter("aot_eager")
    compiled = torch.compile(call.function, fullgraph=True, backend=counter)
    for temperature in values((1, 8)):
        parts = [f(*call.tensors, **{**call.keywords, "temperature": temperature})
                 for f in (compiled, call.function)]  # fmt: skip
        torch.testing.assert_close(*parts)
    assert counter.graphs <= MOST_GRAPHS


def test_integers(backend):
    call = sample("soft_target_loss")
    call.keywords["backend"] = backend
    assert follow(call, {"temperature": range(1, STEPS + 1)}) <= MOST_GRAPHS


def test_teacher_weights(backend):
    calls = [x for x in variants("soft_target_loss") if "teacher_weights" in x.keywords]
    call = next(x for x in reversed(calls) if "teacher_temperature" not in x.keywords)
    call.keywords["backend"] = backend
    weights = [[w, 1.5 - w] for w in values((0.1, 0.9))]
    assert len(call.keywords["teacher_weights"]) == 2
    # Their largest is looked for, which is a branch.
    follow_or_raise(call, {"teacher_weights": weights}, is_multiplied=True)


class Scheduled(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.temperature = 1.0
        self.loss = functools.partial(fastkd.soft_target_loss, backend=backend)

    def forward(self, student, teacher):
        return self.loss(student, teacher, temperature=self.temperature)


def test_a_modules_attribute(backend):
    student, teacher = sample("soft_target_loss").tensors
    module, counter = Scheduled(backend), Counter("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for module.temperature in values((1, 8)):
        results = []
        for function in (compiled, module):
            leaf = student.clone().requires_grad_()
            loss = function(leaf, teacher)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results)
    assert counter.graphs <= MOST_GRAPHS


def test_what_does_not_change_stays_a_constant(kernel_backend):
    """No tensor is made of it, which a GPU's graphs would not capture."""
    call = sample("distillation_loss")
    call.keywords["backend"] = kernel_backend
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(call.__call__, fullgraph=True, backend=keep)
    compiled()
    (node,) = [n for n in graphs[0].graph.nodes if "fastkd" in str(n.target)]
    assert len(node.args) < len(node.target._schema.arguments)
    assert [x for x in node.args if isinstance(x, float)] == [
        *(2.0, 2.0, 3.6, 0.1, 0.0, 0.5),
        *(0.0, 0.0),  # no softcaps
    ]


@pytest.mark.parametrize("name", WEIGHTED)
def test_pair_weights_compile_twice(backend, name):
    call = next(x for x in variants(name) if "pair_weights" in x.keywords)
    schedule = list(zip(values((1, 0.1)), values((0.5, 3)), strict=True))
    call.keywords["backend"] = backend
    schedules = {"pair_weights": [list(weights) for weights in schedule]}
    follow_or_raise(call, schedules, multiplies(call, name))
