"""fastkd.compat.torchdistill against torchdistill's own losses, where it is installed."""

import inspect

import pytest
import torch
from compat import assert_stands_for, draw_logits, is_without_gradient
from conventions import draw
from hooked import AT_PAIRS, FSP_PAIRS, of_loss, of_modules

import fastkd
from fastkd.compat import torchdistill as compat

pytest.importorskip("torchdistill")
from torchdistill.losses import mid_level, registry

K, B = 7, 5
LABELS = torch.tensor([0, 6, 3, 2, 2])
PIXELS = torch.randint(K, (2, 3, 4))
LOSSES = [name for name in compat.__all__ if name != "register"]
at_module = of_modules("module")
reductions = pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
# torch announces that KLDivLoss's "mean" will change.
announced = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")


def both(name, keywords):
    return (getattr(library, name)(**keywords) for library in (compat, mid_level))


def assert_same_loss(backend, name, keywords, tensors, *arguments, students=None):
    ours, theirs = (of_loss(criterion, *arguments) for criterion in both(name, keywords))
    students = len(tensors) if students is None else students
    assert_stands_for(backend, ours, theirs, *tensors, students=students)


@pytest.mark.parametrize("name", LOSSES)
def test_constructors_have_the_same_arguments(name):
    """In the same order, with the same defaults; so does forward."""
    for method in ("__init__", "forward"):
        ours, theirs = (
            inspect.signature(getattr(getattr(library, name), method)).parameters.values()
            for library in (compat, mid_level)
        )
        assert [(p.name, p.default, p.kind) for p in ours] == [
            (p.name, p.default, p.kind) for p in theirs
        ]


weights = pytest.mark.parametrize(
    "weights",
    [{"alpha": 0.3}, {"alpha": 0.3, "beta": 2.0}, {"alpha": 0}, {"alpha": None, "beta": 1.0},
     {"alpha": -0.5, "label_smoothing": 0.2}],
)  # fmt: skip


@announced
@reductions
@weights
@pytest.mark.parametrize("name", ["KDLoss", "LogitStdKDLoss"])
def test_logits(backend, name, weights, reduction):
    """LogitStdKDLoss is KDLoss of standardised logits; both drop T² without the hard term."""
    keywords = {**at_module, "temperature": 1.5, "reduction": reduction, **weights}
    for targets in (LABELS, None):
        assert_same_loss(backend, name, keywords, draw_logits((B, K), (B, K)), targets)


@announced
@reductions
@weights
def test_pixels(backend, weights, reduction):
    keywords = {**at_module, "temperature": 1.5, "reduction": reduction, **weights}
    shape = (2, K, 3, 4)
    for targets in (PIXELS, None):
        assert_same_loss(backend, "KDLoss", keywords, draw_logits(shape, shape), targets)


def test_ignored_pixels(backend):
    """By -100, torch's own default."""
    targets = PIXELS.clone()
    targets[0, 1:] = -100
    keywords = {**at_module, "temperature": 1.5, "alpha": 0.3}
    shape = (2, K, 3, 4)
    assert_same_loss(backend, "KDLoss", keywords, draw_logits(shape, shape), targets)


@pytest.mark.parametrize("ignored", [-100, 2])
def test_ignored_targets(backend, ignored):
    """Are left out of the cross-entropy alone."""
    keywords = {
        **at_module, "temperature": 1.5, "reduction": "batchmean", "alpha": 0.3,
        "ignore_index": ignored,
    }  # fmt: skip
    targets = torch.tensor([0, ignored, 3, ignored, 1])
    for name in ("KDLoss", "LogitStdKDLoss"):
        assert_same_loss(backend, name, keywords, draw_logits((B, K), (B, K)), targets)


def test_weights_of_classes_and_probabilities(backend):
    sides = draw_logits((B, K), (B, K))
    keywords = {**at_module, "temperature": 1.5, "alpha": 0.3}
    ours, theirs = both("KDLoss", {**keywords, "weight": torch.rand(K)})
    assert ours.load_state_dict(theirs.state_dict())
    of_classes = [of_loss(criterion.double(), LABELS) for criterion in (ours, theirs)]
    torch.testing.assert_close(*(loss(*sides) for loss in of_classes))
    probabilities = torch.rand(B, K, dtype=torch.float64).softmax(1)
    of_targets = [of_loss(criterion, probabilities) for criterion in both("KDLoss", keywords)]
    torch.testing.assert_close(*(loss(*sides) for loss in of_targets))


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_skd(backend, mode):
    keywords = {**at_module, "temperature": 1.5, "mode": mode}
    for shape in ((1, K), (5, K), (6, K), (2, K, 3, 4)):
        assert_same_loss(backend, "SKDInstanceLoss", keywords, draw_logits(shape, shape))


@announced
@reductions
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_srd(backend, exponent, reduction):
    keywords = {
        **of_modules("feature_module", "linear_module"), "exponent": exponent,
        "temperature": 1.5, "reduction": reduction,
    }  # fmt: skip
    assert_same_loss(backend, "SRDLoss", keywords, draw((B, 6), (B, K), (B, 6), (B, K)))


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_at(backend, mode):
    shapes = [(4, 3, 5, 5), (4, 2, 3, 4), (4, 6, 5, 5), (4, 4, 3, 4)]
    assert_same_loss(backend, "ATLoss", {"at_pairs": AT_PAIRS, "mode": mode}, draw(*shapes))


def test_fsp(backend):
    shapes = [(3, 4, 6, 6), (3, 5, 3, 4), (3, 2, 4, 3)]
    sides = draw(*shapes, (3, 4, 8, 8), (3, 5, 5, 5), (3, 2, 4, 3))
    assert_same_loss(backend, "FSPLoss", {"fsp_pairs": FSP_PAIRS}, sides, students=3)


def test_fsp_of_equal_columns(backend):
    """A norm of 0 has the gradient 0."""
    layers = draw((3, 4, 6, 6), (3, 5, 6, 6), (3, 2, 6, 6))
    others = [x.clone() for x in layers]
    others[1][:, 2] += 1
    gradients = []
    for criterion in both("FSPLoss", {"fsp_pairs": FSP_PAIRS}):
        leaves = [x.clone().requires_grad_() for x in layers]
        with fastkd.use_backend(backend):
            loss = of_loss(criterion)(*leaves, *others)
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factors", [(1.0, 2.0), (25, 0), (0, 50.0)])
def test_rkd(backend, factors, reduction):
    keywords = {
        "student_output_path": "0", "teacher_output_path": "0", "dist_factor": factors[0],
        "angle_factor": factors[1], "reduction": reduction,
    }  # fmt: skip
    for shapes in ([(9, 4), (9, 6)], [(5, 3, 2, 2), (5, 2, 4, 4)]):
        assert_same_loss(backend, "RKDLoss", keywords, draw(*shapes), students=1)
    ours, _ = both("RKDLoss", keywords)
    assert is_without_gradient(of_loss(ours), *draw((9, 4), (9, 6)))


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_spkd(backend, reduction):
    keywords = {
        "student_output_path": "0", "teacher_output_path": "0", "reduction": reduction
    }  # fmt: skip
    assert_same_loss(backend, "SPKDLoss", keywords, draw((5, 3, 4, 4), (5, 6, 2, 2)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [None, [5, 3], [8]])
def test_hierarchical_context(backend, sizes, reduction):
    keywords = {**at_module, "reduction": reduction, "output_sizes": sizes}

    def of_pair(criterion):
        return lambda s, t: criterion({"0": {"output": (s, None)}}, {"0": {"output": t}})

    ours, theirs = (of_pair(c) for c in both("HierarchicalContextLoss", keywords))
    for size in (6, 2):
        shape = (4, 3, size, size)
        assert_stands_for(backend, ours, theirs, *draw(shape, shape), students=2)


@pytest.fixture
def restored():
    before = dict(registry.MIDDLE_LEVEL_LOSS_DICT)
    yield
    registry.MIDDLE_LEVEL_LOSS_DICT.clear()
    registry.MIDDLE_LEVEL_LOSS_DICT.update(before)


@pytest.fixture
def registered(restored):
    compat.register()


CRITERION = """
key: 'WeightedSumLoss'
kwargs:
  sub_terms:
    kd:
      criterion:
        key: 'KDLoss'
        kwargs:
          student_module_path: '0'
          student_module_io: 'output'
          teacher_module_path: '0'
          teacher_module_io: 'output'
          temperature: 4.0
          alpha: 0.1
          reduction: 'batchmean'
      weight: 1.0
    at:
      criterion:
        key: 'ATLoss'
        kwargs:
          mode: 'paper'
          at_pairs:
            pair1:
              student: {io: 'output', path: '1'}
              teacher: {io: 'output', path: '1'}
              weight: 2
      weight: 10
    dist:
      criterion:
        key: 'DISTLoss'
        kwargs:
          student_module_path: '0'
          student_module_io: 'output'
          teacher_module_path: '0'
          teacher_module_io: 'output'
      weight: 1.0
"""


def test_a_configuration_builds_these_losses(backend, registered):
    """By torchdistill's registry, beside one that stays torchdistill's."""
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load(CRITERION)
    criterion = registry.get_high_level_loss(config)
    kinds = {name: type(term) for name, (term, _) in criterion.term_dict.items()}
    assert kinds == {"kd": compat.KDLoss, "at": compat.ATLoss, "dist": mid_level.DISTLoss}

    registry.MIDDLE_LEVEL_LOSS_DICT.update(KDLoss=mid_level.KDLoss, ATLoss=mid_level.ATLoss)
    theirs = registry.get_high_level_loss(config)
    assert type(theirs.term_dict["kd"][0]) is mid_level.KDLoss
    sides = draw_logits((B, K), (B, 3, 4, 4), (B, K), (B, 6, 4, 4))

    def total(criterion):
        def loss(*tensors):
            half = [{str(i): {"output": x} for i, x in enumerate(side)}
                    for side in (tensors[:2], tensors[2:])]  # fmt: skip
            return criterion({"student": half[0], "teacher": half[1]}, {}, LABELS)

        return loss

    assert_stands_for(backend, total(criterion), total(theirs), *sides, students=2)


def test_every_loss_is_registered(registered):
    for name in LOSSES:
        assert registry.MIDDLE_LEVEL_LOSS_DICT[name] is getattr(compat, name)


def test_a_configuration_registers_them(restored, tmp_path):
    yaml_util = pytest.importorskip("torchdistill.common.yaml_util")
    config = tmp_path / "config.yaml"
    config.write_text("fastkd: !import_call {key: fastkd.compat.torchdistill.register}\n")
    assert registry.MIDDLE_LEVEL_LOSS_DICT["KDLoss"] is mid_level.KDLoss
    yaml_util.load_yaml_file(config)
    assert registry.MIDDLE_LEVEL_LOSS_DICT["KDLoss"] is compat.KDLoss
