"""What all losses of fastkd.compat promise: dtypes, compilation, and examples that run."""

import doctest
import functools
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from hooked import of_loss, of_modules

import fastkd
import fastkd.compat
from fastkd.compat import (
    distillkit,
    kd_lib,
    liger,
    mdistiller,
    modelopt,
    repdistiller,
    torchdistill,
    trl,
)

MIGRATION = Path(__file__).parent.parent / "docs" / "migration.md"
MODULES = sorted(
    name for _, name, _ in pkgutil.iter_modules(fastkd.compat.__path__) if not name.startswith("_")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_example_runs(name):
    module = importlib.import_module(f"fastkd.compat.{name}")
    globs = {"fastkd": fastkd, "torch": torch}
    (test,) = doctest.DocTestFinder(recurse=False).find(module, name, globs=globs)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_the_package_and_the_documents_list_it(name):
    row = f"| `fastkd.compat.{name}` |"
    assert row in fastkd.compat.__doc__
    assert row in MIGRATION.read_text()
    module = importlib.import_module(f"fastkd.compat.{name}")
    for public in module.__all__:
        assert getattr(module, public).__doc__


LABELS = torch.tensor([0, 6, 3, 2, 2])
LOGITS = (5, 7), (5, 7)
TOKENS = (3, 2, 7), (3, 2, 7)
WEIGHT = torch.linspace(-1, 1, 77).reshape(11, 7).bfloat16().float()
ZERO, UNIFORM = distillkit.MissingProbabilityHandling
EMBEDDINGS = (9, 4), (9, 6)
MAPS = (4, 3, 6, 6), (4, 5, 3, 3)
SAME_SIZE = (4, 3, 5, 5), (4, 6, 5, 5)
SAME_SHAPE = (4, 3, 5, 5), (4, 3, 5, 5)
module = of_modules("module")
paths = {"student_output_path": "0", "teacher_output_path": "0"}
one = {"path": "0", "io": "output"}
at_pairs = {"one": {"student": one, "teacher": one}}
fsp_pairs = {
    "one": {f"{side}_{end}": one for side in ("student", "teacher") for end in ("first", "second")}
}


def first(criterion):
    """Of lists of one pair."""
    return lambda s, t: criterion([s], [t])[0]


def swapped(criterion):
    return lambda s, t: criterion(t, s)


def log_softmax(x):
    """Rounded to what every dtype holds."""
    return x.float().log_softmax(-1).bfloat16().to(x.dtype)


def of_logs(criterion):
    return lambda s, t: criterion(log_softmax(s), log_softmax(t))


def of_heads(criterion, labels):
    """Of hidden states, with heads of their dtype."""

    def loss(s, t):
        return criterion(s, WEIGHT.to(s.dtype), t, (WEIGHT + 1).to(t.dtype), labels)

    return loss


def of_kept(function, missing):
    def loss(s, t):
        values, ids = log_softmax(t).topk(3)
        return function(s, ids, values, missing=missing, temperature=2.0)

    return loss


CALLS = {
    "DistillKL": (repdistiller.DistillKL(4.0), LOGITS),
    "HintLoss": (repdistiller.HintLoss(), SAME_SHAPE),
    "Attention": (first(repdistiller.Attention()), MAPS),
    "Attention of p = 3": (first(repdistiller.Attention(3)), MAPS),
    "Similarity": (first(repdistiller.Similarity()), MAPS),
    "RKDLoss": (repdistiller.RKDLoss(), EMBEDDINGS),
    "FSP": (
        lambda s, t: repdistiller.FSP([], [])([s, s], [t, t])[0], ((4, 3, 6, 6), (4, 3, 3, 3)),
    ),
    "kd_loss": (functools.partial(mdistiller.kd_loss, temperature=4.0), LOGITS),
    "squared rkd_loss": (functools.partial(mdistiller.rkd_loss, squared=True), EMBEDDINGS),
    "hcl_loss": (lambda s, t: mdistiller.hcl_loss([s], [t]), SAME_SHAPE),
    "ATLoss of KD_Lib": (
        lambda s, t: kd_lib.ATLoss()([t], [s]) + kd_lib.ATLoss(3)([t], [s]), SAME_SHAPE,
    ),
    "RKDLoss of KD_Lib": (swapped(kd_lib.RKDLoss()), EMBEDDINGS),
    "RKDLoss of KD_Lib, not normalised": (swapped(kd_lib.RKDLoss(normalize=False)), EMBEDDINGS),
    "KDLoss": (
        of_loss(torchdistill.KDLoss(**module, temperature=2.0, alpha=0.1), LABELS), LOGITS,
    ),
    "KDLoss without labels": (of_loss(torchdistill.KDLoss(**module, temperature=2.0)), LOGITS),
    "LogitStdKDLoss": (
        of_loss(torchdistill.LogitStdKDLoss(**module, temperature=2.0, alpha=0.1), LABELS), LOGITS,
    ),
    "SKDInstanceLoss": (of_loss(torchdistill.SKDInstanceLoss(**module, mode="code")), LOGITS),
    "ATLoss": (of_loss(torchdistill.ATLoss(at_pairs, "paper")), SAME_SIZE),
    "FSPLoss": (of_loss(torchdistill.FSPLoss(fsp_pairs)), SAME_SHAPE),
    "SPKDLoss": (of_loss(torchdistill.SPKDLoss(**paths, reduction="batchmean")), MAPS),
    "generalized_jsd_loss": (
        lambda s, t: trl.generalized_jsd_loss(s, t, LABELS - 3) + trl.generalized_jsd_loss(s, t),
        LOGITS,
    ),
    "generalized_jsd_loss of each class": (
        functools.partial(trl.generalized_jsd_loss, reduction="none"), LOGITS,
    ),
    "chunked_divergence_loss": (
        lambda s, t: trl.chunked_divergence_loss(s, t, WEIGHT, WEIGHT + 1, LABELS, 0.3)[0], LOGITS,
    ),
    "compute_topk_self_distillation_loss": (
        lambda s, t: trl.compute_topk_self_distillation_loss(
            s, t, distillation_topk=3, distillation_alpha=0.5, distillation_add_tail=True
        ),
        LOGITS,
    ),
    "LigerKLDIVLoss": (of_logs(liger.LigerKLDIVLoss(reduction="sum", log_target=True)), LOGITS),
    "LigerJSD": (of_logs(liger.LigerJSD(0.3)), LOGITS),
    "LigerTVDLoss": (
        lambda s, t: liger.LigerTVDLoss()(s.softmax(-1), t.softmax(-1), LABELS), LOGITS,
    ),
    "LigerFusedLinearJSD": (of_heads(liger.LigerFusedLinearJSD(0.3), None), LOGITS),
    "LigerFusedLinearJSDLoss": (of_heads(liger.LigerFusedLinearJSDLoss(), LABELS), LOGITS),
    "LogitsDistillationLoss": (modelopt.LogitsDistillationLoss(2.0, "none"), LOGITS),
    "MFTLoss": (lambda s, t: modelopt.MFTLoss(2.0)(s, t, LABELS), LOGITS),
    "TopLogitsKLLoss": (
        lambda s, t: modelopt.TopLogitsKLLoss(None, top_k=3, top_p=0.3)(s, t)[0], TOKENS,
    ),
    "dense_js_div": (distillkit.dense_js_div, TOKENS),
    "sparse_kl_div": (of_kept(distillkit.sparse_kl_div, UNIFORM), TOKENS),
    "sparse_tvd": (of_kept(distillkit.sparse_tvd, ZERO), TOKENS),
}  # fmt: skip
every_call = pytest.mark.parametrize(("loss", "shapes"), CALLS.values(), ids=CALLS)


@every_call
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(loss, shapes, dtype):
    """The loss is float32, and the gradient has the student's dtype."""
    student, teacher = (torch.randn(shape, dtype=dtype) for shape in shapes)
    student.requires_grad_()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.dtype == dtype
    expected = loss(student.detach().float(), teacher.float())
    torch.testing.assert_close(value.detach(), expected, rtol=0.01, atol=1e-4)


@pytest.mark.thorough
@every_call
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(loss, shapes, dynamic):
    """In one graph."""
    torch.compiler.reset()
    student, teacher = (torch.randn(shape) for shape in shapes)
    student.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for call in (loss, compiled):
        value = call(student, teacher)
        results.append((value, *torch.autograd.grad(value.sum(), student)))
    torch.testing.assert_close(*results)
