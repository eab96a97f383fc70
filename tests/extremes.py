"""Extreme logits, and the forms of a kernel in which they are tried."""

import torch
from agreement_logits import logits

# Several rows together, rows of one block and of more, rows side by side, and more classes than
# that form takes.
FORMS = [(40, -1), (700, -1), (2500, -1), (40, 0), (4200, 0)]


def rising(classes):
    """A student and a teacher whose maxima grow or fall from block to block of four rows."""
    steps = torch.linspace(-300, 300, classes)
    student, teacher = logits(4, classes), logits(4, classes)
    student[0] += steps
    teacher[1] += steps
    student[2:], teacher[2:] = student[2:] + steps, teacher[2:] + steps
    student[3], teacher[3] = student[3].flip(0), teacher[3].flip(0)
    return student, teacher


def arranged(tensors, form):
    """The same with the classes where the form has them."""
    return [x.t().contiguous() if form[1] == 0 else x for x in tensors]
