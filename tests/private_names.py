"""What the losses give while torch lacks some of its private names: `private_names.py OUT NAME...`.

A name is taken away while fastkd is imported. Then it is put back, because torch needs it itself.
"""

import contextlib
import functools
import importlib
import sys
import types
import warnings

import torch
from torch.autograd import forward_ad

# Looked up at each call, so that fastkd has to do without these for good.
AT_EACH_CALL = (
    "torch.autograd.forward_ad._current_level",
    "torch.fx.experimental.symbolic_shapes.has_static_value",
)


def by_transform(transform, call):
    return transform(lambda x: call(x, *call.tensors[1:]).sum())(call.tensors[0])


TRANSFORMS = {
    "grad": torch.func.grad,
    "hessian": torch.func.hessian,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),)),
    "vmap": lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
}


def with_gradients(call, function=None, make=lambda x: x):
    """The loss, and its gradients for a `grad_output` of 3 and of 1."""
    leaves = call.leaves()
    loss = (function or call)(*leaves)
    grad_outputs = make(torch.full_like(loss, 3.0)), torch.ones_like(loss)
    three = torch.autograd.grad(loss, leaves, grad_outputs[0], retain_graph=True)
    return loss, three, torch.autograd.grad(loss, leaves, grad_outputs[1])


def once(call):
    leaves = call.leaves()
    loss = call(*leaves)
    return torch.autograd.grad(loss, leaves, torch.ones_like(loss))


def negated(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def without_memory(call):
    first = call.tensors[0]
    return call(torch._efficientzerotensor(first.shape, dtype=first.dtype), *call.tensors[1:])


def traced(call):
    """A trace of other numbers, whose results are no constants of these."""
    others = tuple(2 * x for x in call.tensors)
    return torch.jit.trace(lambda *x: call(*x), others, check_trace=False)(*call.tensors)


def forward_mode(call):
    first = call.tensors[0]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(first, torch.ones_like(first))
        return forward_ad.unpack_dual(call(dual, *call.tensors[1:]).sum()).tangent


def in_batches(call):
    leaves = call.leaves()
    loss = call(*leaves)
    batch = torch.ones(3, *loss.shape, dtype=loss.dtype)
    return torch.autograd.grad(loss, leaves, batch, is_grads_batched=True)


def regressor(call):
    from fastkd.nn import HintLoss

    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    loss = HintLoss(3, 6)
    loss(student, teacher).backward()
    return [p.grad for p in loss.parameters()]


EAGER = {
    "gradients": once,
    "retained": with_gradients,
    "negated": lambda call: call(*map(negated, call.tensors)),
    "negated grad_output": functools.partial(with_gradients, make=negated),
    "without memory": without_memory,
    "trace": traced,
    "forward mode": forward_mode,
    "batches of gradients": in_batches,
    "regressor": regressor,
    **{name: functools.partial(by_transform, t) for name, t in TRANSFORMS.items()},
}


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def schedule(call):
    """Temperatures that change, which compiled code takes for no constants."""
    if "temperature" not in call.keywords:
        return None
    loss = compiled(lambda t, *x: call(*x, temperature=t))
    return [loss(t, *call.tensors) for t in (1.0, 2.5, 3.5)]


def compiled_transform(name, call):
    return compiled(lambda _: by_transform(TRANSFORMS[name], call))(call.tensors[0])


def compiled_forward_mode(call):
    return compiled(lambda _: forward_mode(call))(call.tensors[0])


COMPILED = {
    "compiled": lambda call: with_gradients(call, compiled(call.__call__)),
    "compiled schedule": schedule,
    "compiled forward mode": compiled_forward_mode,
    **{f"compiled {t}": functools.partial(compiled_transform, t) for t in ("grad", "vmap")},
}


@contextlib.contextmanager
def without(path):
    owner, _, name = path.rpartition(".")
    holder = importlib.import_module("torch")
    for part in owner.split(".")[1:]:
        holder = getattr(holder, part)
    value = getattr(holder, name)
    delattr(holder, name)
    yield
    setattr(holder, name, value)


def main(out, uses, *names):
    with contextlib.ExitStack() as missing:
        for name in names:
            if name not in AT_EACH_CALL:
                missing.enter_context(without(name))
        from calls import LOSSES, sample

        import fastkd.nn  # noqa: F401
        from fastkd import operators, symbols, tensors
        from fastkd.reference import attention

    if "torch.autograd.forward_ad._current_level" in names:
        tensors.forward_ad = types.SimpleNamespace(
            make_dual=forward_ad.make_dual, unpack_dual=forward_ad.unpack_dual
        )
    if "torch.fx.experimental.symbolic_shapes.has_static_value" in names:
        # torch.compile cannot do without it; so fastkd alone has not what it would tell.
        for module in (attention, operators, symbols):
            module.is_symbolic = lambda _: False
    warnings.simplefilter("ignore")
    results = {}
    for name in LOSSES:
        torch.manual_seed(1)
        call = sample(name, torch.float64)
        for use, function in {"eager": EAGER, "compiled": COMPILED}[uses].items():
            try:
                results[use, name] = function(call)
            except Exception as error:
                results[use, name] = f"{type(error).__name__}: {error}"
    torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
