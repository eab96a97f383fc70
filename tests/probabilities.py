"""Teachers that state their probabilities, or the logarithms of these."""

import torch
from agreement_logits import GIVEN, logits

KINDS = tuple(GIVEN)


def sides(teacher_is, rows, classes, *dtypes, temperature=1.0, scale=3.0):
    """A student's logits and what a teacher states, of rows with masses around 1.

    The sides nearly agree on no class, where the total variation has its kink.
    """
    student, teacher = (logits(rows, classes, scale=scale).double() for _ in range(2))
    heat = torch.as_tensor(temperature).reshape(-1, 1)
    log_p = teacher.log_softmax(-1) + torch.randn(rows, 1, dtype=torch.float64)
    if teacher_is == "probabilities":
        teacher = log_p.exp().to(dtypes[1])
        log_p = teacher.double().log()
    else:
        teacher = log_p.to(dtypes[1])
        log_p = teacher.double()
    student = student.to(dtypes[0])
    for _ in range(3):
        near = (log_p - (student.double() / heat).log_softmax(-1)).abs() < 1e-4
        student = torch.where(near, student + scale, student)
    return student, teacher
