"""Teachers that kept k classes of each row, and how losses with them agree with the oracle."""

import oracle_top_k
import torch
from agreement import array, check
from agreement_logits import logits
from divergences import FEW
from temperatures import of_kind

import fastkd

TAILS = ("renormalize", "zero", "bucket", "renormalize_both")
TRUE = ("zero", "bucket")
FOR_ALL = ("bucket", "renormalize_both")
# Each tail with each divergence that it goes with, once where that has a formula of its own.
PAIRS = [{"tail": tail} for tail in TAILS] + [
    {"tail": tail, **keywords} for tail in FOR_ALL for keywords in FEW
]
# Each tail, and two divergences and temperatures of rows with one of them: for tests of many forms.
CALLS = [
    *({"tail": tail} for tail in TAILS),
    {"tail": "bucket", **FEW[0]},
    {"tail": "renormalize_both", **FEW[1]},
    {"tail": "bucket", "kind": "rows"},
]
_OF_TOP_K = ("tail", "values_are")


def chosen(rows, classes, k):
    """Classes of each row without order: the likeliest, or any."""
    indices = torch.stack([torch.randperm(classes)[:k] for _ in range(rows)])
    return indices.to(torch.int32 if torch.rand(()) < 0.5 else torch.int64)


def sides(
    rows, classes, k, dtypes, *, tail="renormalize", values_are="logits", temperature=1.0,
    teacher_temperature=None, scale=3.0, **_,
):  # fmt: skip
    """A student's logits, and the values, indices and lse (or None) of a teacher.

    The sides nearly agree on no slot, where the total variation has its kink.
    """
    own = temperature if teacher_temperature is None else teacher_temperature
    own = torch.as_tensor(own, dtype=torch.float64).reshape(-1, 1)
    heat = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    for _ in range(50):
        student = logits(rows, classes, scale=scale, dtype=dtypes[0])
        teacher = logits(rows, classes, scale=scale).double()
        indices = chosen(rows, classes, k)
        log_p = (teacher / own).log_softmax(-1).gather(-1, indices.long())
        lse = None
        if values_are == "log_probs":
            values = log_p
        else:
            values = teacher.gather(-1, indices.long())
            if tail in TRUE:
                precise = torch.float64 if dtypes[1] == torch.float64 else torch.float32
                lse = (teacher / own).logsumexp(-1).to(precise)
            else:
                values = values + torch.randn(rows, 1).double()  # a constant of the row
        q = (student.double() / heat).log_softmax(-1).gather(-1, indices.long())
        if tail == "renormalize_both":
            log_p, q = log_p.log_softmax(-1), q.log_softmax(-1)
        # Of a tiny rest float64 has few digits either.
        is_tiny = tail == "bucket" and k < classes and (log_p.exp().sum(-1) > 0.99).any()
        if not is_tiny and (k == 1 or ((log_p - q).abs() > 1e-3).all()):
            break
    return student, values.to(dtypes[1]), indices, lse


def kept(values, indices, lse=None, **keywords):
    return fastkd.TopK(values, indices, lse=lse, **keywords)


def split(keywords):
    """Those of TopK, and those of the loss."""
    of_teacher = {name: keywords[name] for name in _OF_TOP_K if name in keywords}
    return of_teacher, {name: x for name, x in keywords.items() if name not in _OF_TOP_K}


def check_top_k(
    student, values, indices, lse, backend, grad_output=None, labels=None, teachers=True,
    **keywords,
):  # fmt: skip
    """With labels of `distillation_loss`, otherwise of `soft_target_loss`.

    Temperatures may be tensors, whose gradients are checked as well.
    """
    of_teacher, others = split(keywords)
    heat = [n for n in ("temperature", "teacher_temperature") if torch.is_tensor(others.get(n))]
    tensors = student, values, *(() if lse is None else (lse,)), *(others.pop(n) for n in heat)
    defaults = {}
    if labels is not None:
        defaults = {"temperature": 4.0, "soft_weight": 0.9, "hard_weight": 0.1}

    def named(found):
        found = list(found)
        log_sum = found.pop(0) if lse is not None else None
        return log_sum, dict(zip(heat, found, strict=True))

    def loss(s, v, *found):
        log_sum, of_heat = named(found)
        teacher = kept(v, indices, log_sum, **of_teacher)
        of_call = {**others, **of_heat, "backend": backend}
        if labels is None:
            return fastkd.soft_target_loss(s, teacher, **of_call)
        return fastkd.distillation_loss(s, teacher, labels, **of_call)

    def expected(s, v, *found, grad_output, magnitudes=False):
        log_sum, of_heat = named(found)
        of_call = {**defaults, **others, **of_heat, **of_teacher, "magnitudes": magnitudes}
        if magnitudes:
            of_call.update({n: abs(of_call[n]) for n in of_call if n.endswith("_weight")})
        of_call = {n: array(x) if torch.is_tensor(x) else x for n, x in of_call.items()}
        losses, gradients = oracle_top_k.top_k(
            s, v, array(indices), log_sum, grad_output,
            labels=None if labels is None else array(labels), **of_call,
        )  # fmt: skip
        return losses[0], gradients

    heat_of_rows = torch.as_tensor(keywords.get("temperature", defaults.get("temperature", 1.0)))
    most = heat_of_rows.nan_to_num(0.0).max().item()  # a masked row's may be anything
    size = most**2 if others.get("scale_t2", True) else 1.0
    if "row_weight" in others:
        size *= others["row_weight"].abs().max().item()
    if others.get("reduction") == "sum":
        size *= student[..., 0].numel()
    check(
        loss,
        expected,
        tensors,
        grad_output=grad_output,
        size=size,
        teachers=teachers,
        terms=lambda *arrays, grad_output: expected(
            *arrays, grad_output=abs(grad_output), magnitudes=True
        )[1],
    )


def draw(call, rows, classes, k, dtype=torch.float32):
    """The tensors of one of `CALLS`, student first, and its keywords."""
    keywords = {"temperature": 2.0, **call}
    kind = keywords.pop("kind", None)
    if kind is not None:
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        keywords |= of_kind(kind, (rows, 1), precise, -1)
    return sides(rows, classes, min(k, classes), (dtype, dtype), **keywords), keywords


def check_both(tensors, backend, labels, **keywords):
    """Both losses."""
    check_top_k(*tensors, backend, 3.0, **keywords)
    smoothing = {"label_smoothing": 0.1, **keywords}
    check_top_k(*tensors, backend, labels=labels, **smoothing)
