"""Conventions of temperatures in other libraries: their formulas, and the calls instead."""

import torch.nn.functional as F
from conventions import assert_same, draw, row

import fastkd

T, K, B = 2.0, 7, 5
table = "Soft targets"


def kl(s, t):
    return F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")


@row(table, "the teacher's logits alone are softened, no T²")
def test_the_teacher_alone(backend):
    """Fast-LLM functional/triton/entropy_loss.py."""
    assert_same(
        backend, lambda s, t: fastkd.soft_target_loss(s, t, teacher_temperature=T),
        lambda s, t: kl(s, t / T), *draw((B, K), (B, K)), students=2,
    )  # fmt: skip


def standardized(logits):
    return (logits - logits.mean(-1, keepdim=True)) / (1e-7 + logits.std(-1, keepdim=True))


@row(table, "logits standardised row by row, times T²")
def test_logit_standardization(backend):
    """The authors' mdistiller/distillers/KD.py."""

    def call(s, t):
        of_student, of_teacher = (T * (x.std(-1) + 1e-7) for x in (s, t))
        return T**2 * fastkd.soft_target_loss(
            s, t, temperature=of_student, teacher_temperature=of_teacher, scale_t2=False
        )

    assert_same(
        backend, call, lambda s, t: T**2 * kl(standardized(s) / T, standardized(t) / T),
        *draw((B, K), (B, K)), students=2,
    )  # fmt: skip
