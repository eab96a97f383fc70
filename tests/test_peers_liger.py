"""Liger-Kernel's own divergences, where it is installed, against the calls that replace them."""

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastkd

# Found and not imported: its kernels run in a process of their own.
if not find_spec("liger_kernel"):
    pytest.skip("could not find 'liger_kernel'", allow_module_level=True)
B, K = 6, 37
LABELS = torch.tensor([3, -100, 0, 36, -100, 7])
NONE_KEPT = torch.full((B,), -100)
KEPT = LABELS != -100
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
REDUCTIONS = ("batchmean", "sum", "mean", "none")
SOFT, HARD, T = 0.7, 0.4, 2.0
generator = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (3 * torch.randn(B, K, generator=generator) for _ in range(2))

CASES = {
    **{("jsd", beta, kept): {"beta": beta} for beta in BETAS for kept in ("all", "kept")},
    **{
        ("kl", reduction, log_target): {"reduction": reduction, "log_target": log_target}
        for reduction, log_target in itertools.product(REDUCTIONS, (False, True))
    },
    **{
        ("tvd", reduction, kept): {"reduction": reduction}
        for reduction, kept in itertools.product(REDUCTIONS, ("all", "kept"))
    },
    ("tvd", "batchmean", "none"): {"reduction": "batchmean"},
    **{
        ("linear_jsd", beta, kept): {
            "beta": beta,
            "temperature": T,
            "weight_soft_loss": SOFT,
            "weight_hard_loss": HARD,
        }
        for beta, kept in itertools.product(BETAS, ("kept", "none"))
    },
}
LABELS_OF = {"all": None, "kept": LABELS, "none": NONE_KEPT}


@pytest.fixture(scope="module")
def liger(tmp_path_factory):
    """What it computes for each case, with a grad_output of 1.5."""
    folder = tmp_path_factory.mktemp("liger")
    calls = [
        (key[0], keywords, STUDENT, TEACHER, LABELS_OF.get(key[2]), torch.tensor(1.5))
        for key, keywords in CASES.items()
    ]
    torch.save(calls, folder / "calls")
    program = Path(__file__).with_name("liger_on_cpu.py")
    done = subprocess.run(
        [sys.executable, program, folder / "calls", folder / "results"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, torch.load(folder / "results"), strict=True))


def check(expected, call, backend):
    """`call(student, teacher)` has the value and the gradient that Liger-Kernel found."""
    leaf = STUDENT.clone().requires_grad_()
    with fastkd.use_backend(backend):
        loss = call(leaf, TEACHER)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(1.5).expand_as(loss))
    value = expected[0] if expected[0].ndim == loss.ndim else expected[0].sum(-1)
    torch.testing.assert_close(loss, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-6)


def soft(s, t, kept="all", **keywords):
    keywords |= {} if kept == "all" else {"mask": KEPT}
    return fastkd.soft_target_loss(s, t, scale_t2=False, **keywords)


def of(name):
    return [key for key in CASES if key[0] == name]


@pytest.mark.parametrize("key", of("jsd"), ids=str)
def test_jsd(backend, key, liger):
    _, beta, kept = key
    check(liger[key], lambda s, t: soft(s, t, kept, divergence="jsd", beta=beta), backend)


@pytest.mark.parametrize("key", of("kl"), ids=str)
def test_kl(backend, key, liger):
    """Without a reduction it returns the terms of each class, here a row's terms are added up."""
    _, reduction, log_target = key
    check(liger[key], lambda s, t: soft(s, t, reduction=reduction), backend)

    def target(t):
        """As Liger-Kernel has it."""
        if log_target:
            return fastkd.LogProbabilities(t.log_softmax(-1))
        return fastkd.Probabilities(t.softmax(-1))

    check(liger[key], lambda s, t: soft(s, target(t), reduction=reduction), backend)


@pytest.mark.parametrize("key", [k for k in of("tvd") if k[2] != "none"], ids=str)
def test_tvd(backend, key, liger):
    _, reduction, kept = key
    check(liger[key], lambda s, t: soft(s, t, kept, divergence="tvd", reduction=reduction), backend)


def test_tvd_of_no_row(backend, liger):
    """It divides by 0; here the loss is 0."""
    assert liger["tvd", "batchmean", "none"] == "ZeroDivisionError"
    mask = NONE_KEPT != -100
    assert fastkd.soft_target_loss(
        STUDENT, TEACHER, divergence="tvd", mask=mask, backend=backend
    ) == 0  # fmt: skip


@pytest.mark.parametrize("key", of("linear_jsd"), ids=str)
def test_linear_jsd(backend, key, liger):
    """Hard and soft terms; the soft one has no T² there, and both are over the kept rows."""
    _, beta, kept = key

    def call(s, t):
        return fastkd.distillation_loss(
            s, t, LABELS_OF[kept], temperature=T, soft_weight=SOFT / T**2, hard_weight=HARD,
            divergence="jsd", beta=beta,
        )  # fmt: skip

    check(liger[key], call, backend)
