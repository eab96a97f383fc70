"""TRL among the contenders, by a fake of it."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from benchmark_records import ALL_CASES, hide

from benchmarks import __main__ as cli
from benchmarks import contenders, measure, trl

BETAS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 0.5}


def generalized_jsd_loss(s, t, labels=None, beta=0.5, temperature=1.0, reduction="batchmean"):
    """Over the number of rows that are kept, and with no T²."""
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (s, t))
    q, p = log_q.exp(), log_p.exp()
    if beta in (0, 1):
        rows = (q * (log_q - log_p) if beta else p * (log_p - log_q)).sum(-1)
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        rows = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)
    return rows.mean() if labels is None else rows[labels != -100].mean()


def chunked_divergence_loss(h_s, h_t, weight, teacher_weight, mask, beta):
    """The loss of hidden states, and two more results."""
    s, t = ((h @ w.T)[mask.bool()].float() for h, w in ((h_s, weight), (h_t, teacher_weight)))
    return generalized_jsd_loss(s, t, None, beta, 1.0), None, None


@pytest.fixture
def installed(monkeypatch):
    """The modules of the function; each is found in its parent."""
    names = ["trl", "trl.experimental", "trl.experimental.gkd", "trl.experimental.gkd.gkd_trainer"]
    names += ["trl.trainer", "trl.trainer.distillation_trainer"]
    modules = [ModuleType(name) for name in names]
    modules[3].GKDTrainer = SimpleNamespace(generalized_jsd_loss=generalized_jsd_loss)
    modules[5]._chunked_divergence_loss = chunked_divergence_loss
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    for function in (trl._generalized_jsd_loss, trl._chunked_divergence_loss):
        function.cache_clear()
    yield
    for function in (trl._generalized_jsd_loss, trl._chunked_divergence_loss):
        function.cache_clear()


@pytest.mark.parametrize("name", trl.CONTENDERS)
def test_trl_computes_the_same_losses(installed, name):
    taking_part = [(w, dtype) for w, dtype in ALL_CASES if trl.refusal(name, w) is None]
    of_heads = {"forward_kl", "jsd"}
    assert {trl.divergence_of(w) for w, _ in taking_part} == (
        set(BETAS) if name == "trl" else of_heads
    )
    assert any(w.half_masked for w, _ in taking_part) == (name == "trl")
    for workload, dtype in taking_part:
        small = workload.shrunk(workload.student[0][0] // 2)
        inputs = small.inputs(dtype)
        before = [x.clone() for x in inputs.batch]
        truth = measure.Truth(small, inputs)
        outcome = truth.judge(measure.Trial(contenders.CONTENDERS[name](small), inputs))
        assert outcome.status == "right", outcome
        assert all(map(torch.equal, inputs.batch, before)), "other contenders need these"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_trl_takes_part_where_it_can(installed, device, monkeypatch):
    monkeypatch.setattr(contenders, "BACKENDS", ())
    todo = cli.jobs(cli.parse(["--device", device]), SimpleNamespace(name=device))
    names = {f"{w.loss} {w.name}": names for w, _, names in todo}
    assert "trl" in names["soft_target_loss (256,1000)"]
    assert "trl" in names["soft_target_loss reverse_kl, (1024,32000)"]
    for other in ("tvd, (256,1000)", "3 teachers, (256,1000)", "dim=1, (2,19,64,128)"):
        assert "trl" not in names[f"soft_target_loss {other}"]
    assert "trl" not in names["distillation_loss (128,100)"]
    heads = names["soft_target_loss jsd, 32000 classes, (2048,1024)"]
    assert "trl_linear" in heads
    assert "trl" not in heads


def test_trl_is_refused_by_name_where_it_is_missing(monkeypatch):
    hide(monkeypatch, "trl")
    for options, reason in [
        (("--filter", "jsd"), "TRL cannot be imported: "),
        (("--filter", "tvd"), "TRL has no tvd"),
        (("--filter", "hint"), "trl is for soft_target_loss, not for hint_loss"),
        (("--filter", "dim=1"), "the classes last"),
        (("--filter", "ensemble"), "one teacher"),
    ]:
        with pytest.raises(SystemExit, match=f"trl cannot run here: .*{reason}"):
            cli.jobs(cli.parse(["--contenders", "trl", *options]), SimpleNamespace(name="cpu"))
