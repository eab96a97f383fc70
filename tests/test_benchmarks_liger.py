"""Liger-Kernel among the contenders, by a fake of it."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from benchmark_records import ALL_CASES, hide

from benchmarks import __main__ as cli
from benchmarks import contenders, liger, measure
from fastkd.dispatch import Explanation


class FakeKLDivLoss(torch.nn.KLDivLoss):
    """Takes its arguments as Liger-Kernel's class does."""

    def __init__(self, eps=1e-10, *args, **kwargs):
        super().__init__(*args, **kwargs)


class FakeCrossEntropyLoss:
    """Leaves its gradient where the logits were, as Liger-Kernel's does."""

    def __call__(self, logits, labels):
        return Overwriting.apply(logits, labels)


class Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        loss = F.cross_entropy(logits, labels)
        one_hot = F.one_hot(labels, logits.shape[1])
        logits.data.copy_((logits.softmax(1) - one_hot) / len(labels))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        return ctx.saved_tensors[0].mul_(grad_output), None


class FakeJSD:
    """Of `(log_q, log_p, labels)`, over the number of rows that are kept."""

    def __init__(self, beta):
        self.beta = beta

    def __call__(self, log_q, log_p, labels):
        beta, (q, p) = self.beta, (log_q.exp(), log_p.exp())
        log_m = log_p if beta == 1 else log_q if beta == 0 else (beta * p + (1 - beta) * q).log()
        of_p, of_q = p * (log_p - log_m), q * (log_q - log_m)
        rows = (of_q if beta == 1 else of_p if beta == 0 else beta * of_p + (1 - beta) * of_q).sum(
            1
        )
        return rows.mean() if labels is None else rows[labels != -100].mean()


class FakeTVDLoss:
    """Of probabilities, over the number of rows."""

    def __init__(self, reduction):
        assert reduction == "batchmean"

    def __call__(self, q, p):
        return 0.5 * (p - q).abs().sum() / len(q)


class FakeFusedLinearJSDLoss:
    def __init__(self, weight_hard_loss, weight_soft_loss, beta, compiled):
        assert (weight_hard_loss, weight_soft_loss, compiled) == (0, 1, False)
        self.divergence = FakeJSD(beta)

    def __call__(self, student, weight, teacher, teacher_weight, labels):
        assert labels.shape == student.shape[:1]
        sides = student @ weight.T, teacher @ teacher_weight.T
        return self.divergence(*(x.float().log_softmax(-1) for x in sides), None)


@pytest.fixture
def liger_kernel(monkeypatch):
    fake = ModuleType("liger_kernel.transformers")
    fake.LigerKLDIVLoss, fake.LigerJSD = FakeKLDivLoss, FakeJSD
    fake.LigerCrossEntropyLoss, fake.LigerTVDLoss = FakeCrossEntropyLoss, FakeTVDLoss
    parent = ModuleType("liger_kernel")
    parent.transformers = fake
    parent.chunked_loss = ModuleType("liger_kernel.chunked_loss")
    parent.chunked_loss.LigerFusedLinearJSDLoss = FakeFusedLinearJSDLoss
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", parent.chunked_loss)
    monkeypatch.setitem(sys.modules, "liger_kernel", parent)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)


@pytest.mark.parametrize("name", liger.CONTENDERS)
def test_liger_computes_the_same_losses(name, liger_kernel):
    taking_part = [
        (w, dtype) for w, dtype in ALL_CASES if contenders.refusal(name, w, dtype, "cuda") is None
    ]
    assert {w.loss for w, _ in taking_part} == set(liger.LOSSES[name])
    divergences = {liger.divergence_of(w) for w, _ in taking_part}
    assert divergences == set(liger.DIVERGENCES[name]) - (
        {"reverse_kl"} if name == "liger_linear" else set()  # which no workload has
    )
    for workload, dtype in taking_part:
        small = workload.shrunk(workload.student[0][0] // 2)
        inputs = small.inputs(dtype)
        before = [x.clone() for x in inputs.batch]
        truth = measure.Truth(small, inputs)
        outcome = truth.judge(measure.Trial(contenders.CONTENDERS[name](small), inputs))
        assert outcome.status == "right", outcome
        assert all(map(torch.equal, inputs.batch, before)), "other contenders need these"


def lineups(*arguments):
    options = cli.parse(["--device", "cuda", *arguments])
    todo = cli.jobs(options, SimpleNamespace(name=options.device))
    return {f"{w.loss} {w.name}": names for w, _, names in todo}


def test_liger_takes_part_where_it_can(liger_kernel, monkeypatch):
    def explain(workload, dtype, device, name):
        return Explanation(workload.loss, None, {name: "no kernels"})

    monkeypatch.setattr(contenders, "explain", explain)
    hide(monkeypatch, "trl")
    names = lineups()
    assert names["soft_target_loss (128,100)"] == [
        "eager", "compile", "reference", "liger", "liger_jsd",
    ]  # fmt: skip
    usual = ["eager", "compile", "reference"]
    assert names["soft_target_loss jsd, (256,1000)"] == [*usual, "liger_jsd"]
    assert names["soft_target_loss tvd, (256,1000)"] == [*usual, "liger_tvd"]
    assert names["soft_target_loss skew_kl, (256,1000)"] == usual
    assert names["soft_target_loss half of the rows, (256,1000)"] == [*usual, "liger_jsd"]
    assert names["distillation_loss (128,100)"] == ["eager", "compile", "reference", "liger"]
    assert names["soft_target_loss dim=1, (2,19,64,128)"] == ["eager", "compile", "reference"]
    assert names["hint_loss (64,128,16,16)"] == ["eager", "compile", "reference"]

    for options, reason in [
        (("--filter", "hint"), "liger is for soft_target_loss and distillation_loss, not for hint"),
        (("--filter", "dim=1"), "the classes last"),
        (("--device", "cpu"), "for a GPU"),
    ]:
        with pytest.raises(SystemExit, match=f"liger cannot run here: .*{reason}"):
            lineups("--contenders", "liger", *options)
    hide(monkeypatch, "liger_kernel")
    assert lineups("--filter", "(128,100)") == {
        "soft_target_loss (128,100)": ["eager", "compile", "reference"],
        "distillation_loss (128,100)": ["eager", "compile", "reference"],
    }
    with pytest.raises(SystemExit, match=r"liger_jsd cannot run here: .+ imported"):
        lineups("--contenders", "liger_jsd")
