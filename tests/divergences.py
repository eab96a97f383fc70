"""The divergences, with the betas at which they are tested."""

import torch
from agreement_logits import logits

BETAS = (0, 0.1, 0.5, 0.9, 1)
MIXTURES = ("jsd", "skew_kl", "skew_reverse_kl")
# All but forward KL, which every other test is about.
DIVERGENCES = [
    {"divergence": "reverse_kl"},
    {"divergence": "tvd"},
    *({"divergence": "jsd", "beta": beta} for beta in BETAS),
    # At 1 they are 0, and so is their gradient: a test of its own.
    *({"divergence": name, "beta": beta} for name in MIXTURES[1:] for beta in BETAS[:-1]),
]
# Each once, where it has a formula of its own.
FEW = [*DIVERGENCES[:2], *({"divergence": name, "beta": 0.3} for name in MIXTURES)]
# Those that are finite whatever a side excludes.
BOUNDED = [x for x in DIVERGENCES if x["divergence"] != "reverse_kl" and x.get("beta", 0.5) != 0]
BOUNDED = [x for x in BOUNDED if x != {"divergence": "jsd", "beta": 1}]


def is_reverse_kl(divergence, beta=0.5, **_):
    """Whether that is what these keywords stand for."""
    return (divergence, beta) in [("reverse_kl", 0.5), ("jsd", 1), ("skew_reverse_kl", 0)]


def name_of(keywords):
    return "-".join(str(value) for value in keywords.values())


def sides(rows, classes, *dtypes, temperature=1.0, teacher_temperature=None, scale=3.0):
    """A student and teachers, none of whose classes the sides nearly agree on.

    There the total variation has its kink, and rounding decides on which side of it a class is.
    """
    student, *teachers = (logits(rows, classes, dtype=dtype, scale=scale) for dtype in dtypes)
    own = temperature if teacher_temperature is None else teacher_temperature
    of_student, of_teacher = (torch.as_tensor(t).reshape(-1, 1) for t in (temperature, own))
    for _ in range(3):
        log_q = (student.double() / of_student).log_softmax(-1)
        logs = [(x.double() / of_teacher).log_softmax(-1) for x in teachers]
        log_p = torch.stack(logs).logsumexp(0) - torch.tensor(float(len(logs))).log()
        near = (log_p - log_q).abs() < 1e-4
        student = torch.where(near, student + scale, student)
    return student, *teachers
