"""Conventions of attention transfer and hints in other libraries."""

import pytest
import torch
import torch.nn.functional as F
from conventions import assert_same, draw, row

import fastkd

SIDES = [(4, 3, 5, 5), (4, 6, 5, 5)]
attention = "Attention transfer"
hints = "Hints"
mse = {"distance": "mse"}


def code(f, p=2):
    """`at` of szagoruyko/attention-transfer utils.py, RepDistiller distiller_zoo/AT.py."""
    return F.normalize(f.pow(p).mean(1).flatten(1))


def code_loss(s, t, p=2):
    """`at_loss` of the same files, mdistiller distillers/AT.py, mmrazor losses/at_loss.py."""
    return (code(s, p) - code(t, p)).pow(2).mean()


def paper_loss(s, t):
    """torchdistill losses/mid_level.py ATLoss with mode="paper"."""
    q_s, q_t = (F.normalize(f.pow(2).sum(1).flatten(1)) for f in (s, t))
    return torch.norm(q_s - q_t, dim=1).sum() / len(s)


@row(attention, "`(beta/2) · mean_b ‖Q_S − Q_T‖₂`")
def test_the_paper(backend):
    assert_same(
        backend, fastkd.attention_transfer_loss, lambda s, t: paper_loss(s, t) / 2, *draw(*SIDES)
    )


@row(attention, "norm without the half")
def test_norm_without_the_half(backend):
    assert_same(
        backend, lambda s, t: fastkd.attention_transfer_loss(s, t, beta=2), paper_loss,
        *draw(*SIDES),
    )  # fmt: skip


@row(attention, "mean of squared differences, p = 2")
def test_the_code(backend):
    assert_same(
        backend, lambda s, t: fastkd.attention_transfer_loss(s, t, **mse), code_loss, *draw(*SIDES)
    )


@row(attention, "mean over channels, not sum")
def test_mean_over_channels(backend):
    (f,) = draw(SIDES[0])
    torch.testing.assert_close(code(f), F.normalize(f.pow(2).sum(1).flatten(1)))
    with fastkd.use_backend(backend):
        torch.testing.assert_close(fastkd.attention_map(f), code(f))


@row(attention, "larger features pooled to the smaller")
def test_pooled(backend):
    def formula(s, t):
        size = min(s.shape[2], t.shape[2])
        if s.shape[2] > size:
            s = F.adaptive_avg_pool2d(s, (size, size))
        elif t.shape[2] > size:
            t = F.adaptive_avg_pool2d(t, (size, size))
        return code_loss(s, t)

    def call(s, t):
        return fastkd.attention_transfer_loss(s, t, resize="adaptive_avg_pool", **mse)

    for shapes in ([(4, 3, 8, 8), (4, 6, 5, 5)], [(4, 3, 4, 4), (4, 6, 8, 8)]):
        assert_same(backend, call, formula, *draw(*shapes))


@row(attention, "a list of losses, one for each pair, which the program sums")
def test_lists(backend):
    """RepDistiller: `sum(criterion(g_s, g_t))`."""
    shapes = [(4, 3, 5, 5), (4, 6, 3, 3), (4, 2, 5, 5), (4, 5, 3, 3)]

    def formula(*f):
        return sum([code_loss(s, t) for s, t in zip(f[:2], f[2:], strict=True)])

    def call(*f):
        return fastkd.attention_transfer_loss(f[:2], f[2:], **mse)

    assert_same(backend, call, formula, *draw(*shapes), students=2)

    def weighted(*f):
        return 3 * code_loss(f[0], f[2]) + 0.5 * code_loss(f[1], f[3])

    def call_weighted(*f):
        return fastkd.attention_transfer_loss(f[:2], f[2:], pair_weights=[3, 0.5], **mse)

    assert_same(backend, call_weighted, weighted, *draw(*shapes), students=2)


@row(attention, "`A.pow(p)` without the absolute value")
@pytest.mark.parametrize("p", [1, 1.5, 3, 4])
def test_power_without_absolute_value(backend, p):
    def call(s, t):
        return fastkd.attention_transfer_loss(s, t, p=p, **mse)

    s, t = draw(*SIDES)
    # Away from 0, where a ReLU has no derivative to compare.
    s, t = (f.relu() + 0.1 * (f > 0) for f in (s, t))
    assert_same(backend, call, lambda s, t: code_loss(s, t, p), s + 0.01, t)
    if p % 2:
        with fastkd.use_backend(backend):
            assert not torch.allclose(call(s - 1, t - 1), code_loss(s - 1, t - 1, p))
    if p == 1.5:
        assert code_loss(s - 1, t - 1, p).isnan()


@row(attention, "fewer student maps than teacher maps, zipped")
def test_fewer_maps(backend):
    s, t = draw(*SIDES)
    with fastkd.use_backend(backend), pytest.raises(ValueError, match="same number"):
        fastkd.attention_transfer_loss([s], [t, t])


@row(hints, "`½‖·‖²` per sample")
def test_half_the_square(backend):
    s, t = draw(SIDES[0], SIDES[0])
    assert_same(
        backend, fastkd.hint_loss, lambda s, t: (s - t).pow(2).flatten(1).sum(1).mean() / 2, s, t
    )


@row(hints, "mean squared error")
def test_mean_squared_error(backend):
    """RepDistiller distiller_zoo/FitNet.py HintLoss; mdistiller distillers/FitNet.py."""
    assert_same(
        backend, fastkd.nn.HintLoss(half=False, reduction="mean"), torch.nn.MSELoss(),
        *draw(SIDES[0], SIDES[0]),
    )  # fmt: skip


@row(hints, "features flattened and normalised first")
def test_normalised(backend):
    """mmrazor losses/l2_loss.py L2Loss."""

    def formula(s, t):
        s, t = (f.flatten(1) / f.flatten(1).norm(2, dim=1, keepdim=True) for f in (s, t))
        return (s - t).pow(2).sum() / len(s)

    def call(s, t):
        return fastkd.hint_loss(F.normalize(s.flatten(1)), F.normalize(t.flatten(1)), half=False)

    assert_same(backend, call, formula, *draw(SIDES[0], SIDES[0]))


CONVOLUTIONS = [
    ((5, 5), (5, 5), lambda: torch.nn.Conv2d(3, 6, 1)),
    ((6, 6), (3, 3), lambda: torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)),
    ((3, 3), (6, 6), lambda: torch.nn.ConvTranspose2d(3, 6, 4, stride=2, padding=1)),
    ((5, 5), (4, 4), lambda: torch.nn.Conv2d(3, 6, 2)),
]


@row(hints, "convolution with batch norm and ReLU as regressor")
@pytest.mark.parametrize(("student", "teacher", "convolution"), CONVOLUTIONS)
def test_convolution_as_regressor(backend, student, teacher, convolution):
    """RepDistiller models/util.py ConvReg: the convolution follows from the two heights."""
    regressor = torch.nn.Sequential(convolution(), torch.nn.BatchNorm2d(6), torch.nn.ReLU())
    regressor.double().eval()
    module = fastkd.nn.HintLoss(3, 6, half=False, reduction="mean")
    module.regressor = regressor
    assert_same(
        backend, module, lambda s, t: F.mse_loss(regressor(s), t),
        *draw((4, 3, *student), (4, 6, *teacher)),
    )  # fmt: skip


@row(hints, "1×1 convolution as regressor")
def test_pointwise_convolution(backend):
    module = fastkd.nn.HintLoss(3, 6, half=False, reduction="mean").double()
    assert_same(backend, module, lambda s, t: F.mse_loss(module.regressor(s), t), *draw(*SIDES))
