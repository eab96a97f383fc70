"""Any finite logit is a legal one: masks such as `finfo.min` in place of -inf, and differences that
leave the range of the dtype.
"""

import math

import mpmath
import numpy as np
import oracle
import pytest
import torch
from agreement import DTYPES, array, assert_loss
from agreement_logits import check_distillation, check_soft_target, logits
from extremes import FORMS, arranged

import fastkd

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPE_PAIRS = [*((dtype, dtype) for dtype in DTYPES), (BF16, F32), (F32, F16), (F64, F32)]
TEMPERATURES = [0.01, 0.5, 1.0, 4.0, 1000.0]

every_form = pytest.mark.parametrize("form", FORMS, ids=str)
every_pair = pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")


def sides(form, dtypes, temperature, rows=8):
    """A student and teachers, with the classes last. Rows differ in who masks what."""
    student, *teachers = (logits(rows, form[0], dtype=dtype) for dtype in dtypes)
    # Of half precision's least number an exponential at 1000 is not 0, but e^-65, which times a
    # float32 student's mask would be all of the loss, and as right as float32 has such a number.
    narrow = F16 in dtypes and temperature > 300

    def limit(x):
        return torch.finfo(F16 if narrow else x.dtype).max

    def mask(x):
        """One of those that users write."""
        least = -limit(x)
        values = [least, least / 2, -1e36, -3e38, -1e300, -65504.0, -1e4]
        values = [value for value in values if least <= value and (value < -200 * temperature)]
        return values[int(torch.randint(len(values), ()))] if values else least

    for teacher in teachers:
        # Masked by the teacher alone, by both, and by both but for one class.
        teacher[0, ::3] = mask(teacher)
        teacher[1, ::3] = mask(teacher)
        teacher[2, 1:] = mask(teacher)
        # The first block of a row, and its last one.
        teacher[3, : 3 * form[0] // 4] = mask(teacher)
        teacher[4, form[0] // 4 :] = mask(teacher)
        # A mask beside -inf.
        teacher[5, ::3] = mask(teacher)
        teacher[5, ::6] = -math.inf
        # As far apart as can be: the difference from the maximum leaves the range of the dtype.
        teacher[6, ::2] = -limit(teacher)
        teacher[6, 5] = limit(teacher) / 1.1
    student[1, ::3] = mask(student)
    student[2, 1:] = mask(student)
    student[4, form[0] // 4 :] = mask(student)
    student[5, ::3] = mask(student)
    student[5, ::6] = -math.inf
    student[6, ::2] = -limit(student)
    student[6, 5] = limit(student) / 1.1
    return student, teachers


def student_masks_more(form, dtypes, temperature, rows=4):
    """Classes of the teacher that the student masks: the loss is huge, or infinite.

    The probabilities of these classes are well above what float32 takes for 0.
    """
    scale = min(temperature, 1.0)
    student, *teachers = (logits(rows, form[0], dtype=dtype, scale=scale) for dtype in dtypes)
    least = torch.finfo(student.dtype).min
    student[0, ::3] = least
    student[1, 3] = least / 4
    student[2, -1] = least / 1e3
    # Beyond the range of the dtype, if it is that of the arithmetic.
    student[3, :-1], student[3, -1] = least, -least
    return student, teachers


def has_teachers(backend, temperature):
    """Whether teachers' gradients are what they should be although the loss is infinite.

    Torch's autograd, through which the reference's come, forms T times the gradient first, which
    leaves the dtype's range where the loss does.
    """
    return backend != "reference" or temperature < 100


def check(student, teachers, form, backend, temperature, **keywords):
    student, *teachers = arranged([student, *teachers], form)
    teacher = teachers if len(teachers) > 1 else teachers[0]
    keywords = {"temperature": temperature, "dim": form[1], **keywords}
    keywords["teachers"] = has_teachers(backend, temperature)
    check_soft_target(student, teacher, backend, **keywords)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@every_pair
@every_form
def test_masked_classes(backend, form, dtypes, temperature):
    student, teachers = sides(form, dtypes, temperature)
    keywords = {"temperature": temperature, "scale_t2": temperature != 0.5}
    check(student, teachers, form, backend, reduction="none", **keywords)
    check(student, teachers, form, backend, grad_output=3.0, **keywords)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    "dtypes", [(F32, F32, BF16), (F16, F16, F16), (BF16, BF16, F32, F16), (F64, F64, F32)]
)
@every_form
def test_masked_classes_of_ensembles(backend, form, dtypes, temperature):
    student, teachers = sides(form, dtypes, temperature)
    keywords = {"temperature": temperature, "teacher_weights": [2, 1, 0.5][: len(teachers)]}
    check(student, teachers, form, backend, reduction="none", **keywords)
    check(student, teachers, form, backend, grad_output=3.0, **keywords)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@every_pair
@every_form
def test_classes_that_only_the_student_masks(backend, form, dtypes, temperature):
    student, teachers = student_masks_more(form, dtypes, temperature)
    keywords = {"temperature": temperature, "scale_t2": temperature != 0.5}
    check(student, teachers, form, backend, reduction="none", **keywords)
    check(student[:3], [t[:3] for t in teachers], form, backend, reduction="mean", **keywords)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtypes", [(F32, F32, BF16), (BF16, F32, F16), (F64, F64, F32)])
@every_form
def test_classes_that_only_the_student_of_an_ensemble_masks(backend, form, dtypes, temperature):
    student, teachers = student_masks_more(form, dtypes, temperature)
    check(student, teachers, form, backend, reduction="none", temperature=temperature)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 4.0, 1000.0])
@every_pair
@every_form
def test_distillation(backend, form, dtypes, temperature, smoothing):
    """Sums of masked logits overflow float32 where their mean does not."""
    student, teachers = sides(form, dtypes, temperature)
    labels = torch.tensor([4, 4, 0, form[0] - 1, 0, 4, 5, 1])
    if smoothing:
        # An excluded class makes a smoothed cross-entropy infinite.
        student[5, ::6] = teachers[0][5, ::6] = -1e4
    for first, other in [(student, teachers), (student_masks_more(form, dtypes, temperature, 8))]:
        parts_and_gradient(first, other, labels, form, backend, temperature, smoothing)
        labels = labels.clone()
        labels[3] = -100
    # What another teacher does not exclude the student must not, either.
    student[5, ::6] = -1e4
    scale = min(temperature, 1.0)
    ensemble = [*teachers, logits(8, form[0], dtype=dtypes[0], scale=scale)]
    parts_and_gradient(student, ensemble, labels, form, backend, temperature, smoothing)


def parts_and_gradient(student, teachers, labels, form, backend, temperature, smoothing):
    student, *teachers = arranged([student, *teachers], form)
    teacher = teachers if len(teachers) > 1 else teachers[0]
    keywords = {"temperature": temperature, "label_smoothing": smoothing, "dim": form[1]}
    teachers_too = has_teachers(backend, temperature)
    check_distillation(student, teacher, labels, backend, teachers=teachers_too, **keywords)
    expected, _ = oracle.distillation(
        array(student), [*map(array, teachers)], array(labels), **keywords
    )
    actual = fastkd.distillation_loss(
        student, teacher, labels, return_parts=True, backend=backend, **keywords
    )
    size = max(temperature**2, 1.0)
    for part, value in zip(actual, expected, strict=True):
        assert_loss(part, value, (student, *teachers), size=size)


def exact(student, teacher, temperature):
    """T² KL and its derivatives, by mpmath with 60 digits and exponents without bounds."""
    with mpmath.workdps(60):
        t = mpmath.mpf(temperature)
        s, y = ([mpmath.mpf(float(x)) / t for x in side] for side in (student, teacher))
        distributions = []
        for side in (s, y):
            largest = max(side)
            exponentials = [mpmath.exp(x - largest) for x in side]
            log_sum = mpmath.log(mpmath.fsum(exponentials)) + largest
            distributions.append([x - log_sum for x in side])
        log_q, log_p = distributions
        ratios = [a - b for a, b in zip(log_p, log_q, strict=True)]
        p = [mpmath.exp(x) for x in log_p]
        kl = mpmath.fsum(a * b for a, b in zip(p, ratios, strict=True))
        to_student = [t * (mpmath.exp(b) - a) for a, b in zip(p, log_q, strict=True)]
        to_teacher = [t * a * (r - kl) for a, r in zip(p, ratios, strict=True)]
    return float(t * t * kl), np.array(to_student, float), np.array(to_teacher, float)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_oracle_is_right_there(dtype, temperature):
    form = (40, -1)
    student, (teacher,) = sides(form, (dtype, dtype), temperature)
    keep = [0, 1, 2, 3, 4, 6, 7]
    more, (other,) = student_masks_more(form, (dtype, dtype), temperature)
    for s, t in zip([*student[keep], *more], [*teacher[keep], *other], strict=True):
        s, t = array(s), array(t)
        loss, gradients = oracle.soft_target(s[None], t[None], temperature=temperature)
        value, *wanted = exact(s, t, temperature)
        size = max(temperature**2, abs(value))
        assert loss == value or abs(loss - value) <= 1e-13 * size
        _, terms = oracle.soft_target(s[None], t[None], temperature=temperature, magnitudes=True)
        for one, right, of_terms in zip(gradients, wanted, terms, strict=True):
            np.testing.assert_array_less(
                np.abs(one[0] - right), 1e-14 * np.abs(of_terms).max() + 1e-300
            )
