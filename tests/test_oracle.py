"""The oracle itself: values from 50-digit arithmetic, derivatives from its central differences."""

import mpmath as mp
import numpy as np
import oracle
import pytest

STEP = mp.mpf(10) ** -20


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(60):
        yield


def derivatives(function, *arrays):
    """The gradient of a function of nested lists of mpf, by moving one number at a time."""

    def moved(which, index, step):
        copies = [np.vectorize(mp.mpf, otypes=[object])(a) for a in arrays]
        copies[which][index] += step
        return function(*copies)

    return [
        np.reshape(
            [
                float((moved(i, at, STEP) - moved(i, at, -STEP)) / (2 * STEP))
                for at in np.ndindex(a.shape)
            ],
            a.shape,
        )
        for i, a in enumerate(arrays)
    ]


def check(function, arrays, loss, gradients):
    np.testing.assert_allclose(loss, float(function(*arrays)), rtol=1e-13)
    for actual, expected in zip(gradients, derivatives(function, *arrays), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-14)


def softmax(row, temperature=1):
    exponentials = [mp.exp(mp.mpf(x) / temperature) for x in row]
    return [e / mp.fsum(exponentials) for e in exponentials]


def kl(teacher, student, temperature):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return mp.fsum(a * mp.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_soft_target(numbers, temperature):
    student, teacher = 3 * numbers(2, 3), 3 * numbers(2, 3)

    def loss(s, t):
        return temperature**2 * mp.fsum(map(kl, t, s, [temperature] * 2)) / 2

    check(loss, (student, teacher), *oracle.soft_target(student, teacher, temperature=temperature))


@pytest.mark.parametrize("weights", [None, [3, 1]])
def test_soft_target_of_an_ensemble(numbers, weights):
    student, *teachers = (3 * numbers(2, 3) for _ in range(3))
    shares = [mp.mpf(w) / sum(weights or [1, 1]) for w in weights or [1, 1]]

    def row(s, *ts):
        of_classes = zip(*(softmax(t, 2) for t in ts), strict=True)
        p = [mp.fsum(map(mp.fmul, shares, one)) for one in of_classes]
        return mp.fsum(a * mp.log(a / b) for a, b in zip(p, softmax(s, 2), strict=True))

    check(
        lambda s, *ts: 4 * mp.fsum(map(row, s, *ts)) / 2,
        (student, *teachers),
        *oracle.soft_target(student, teachers, temperature=2.0, teacher_weights=weights),
    )


DIVERGENCES = [
    *[("reverse_kl", 0.5), ("tvd", 0.5)],
    *[(name, beta) for name in ("jsd", "skew_kl", "skew_reverse_kl") for beta in (0, 0.1, 0.9, 1)],
]


def divergence_of(name, beta, p, q):
    """Of two distributions, as the papers have it."""

    def kl(a, b):
        return mp.fsum(x * mp.log(x / y) for x, y in zip(a, b, strict=True))

    def mixture(a, b):
        return [beta * x + (1 - beta) * y for x, y in zip(a, b, strict=True)]

    beta = mp.mpf(beta)
    if name == "jsd" and beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    return {
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixture(p, q)) + (1 - beta) * kl(q, mixture(p, q)),
        "tvd": lambda: mp.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
        "skew_kl": lambda: kl(p, mixture(p, q)),
        "skew_reverse_kl": lambda: kl(q, mixture(q, p)),
    }[name]()


@pytest.mark.parametrize("weights", [[1], [3, 1]])
@pytest.mark.parametrize(("name", "beta"), DIVERGENCES)
def test_divergences(numbers, name, beta, weights):
    student, *teachers = (3 * numbers(2, 3) for _ in range(1 + len(weights)))
    shares = [mp.mpf(w) / sum(weights) for w in weights]

    def row(s, *ts):
        of_classes = zip(*(softmax(t, 2) for t in ts), strict=True)
        p = [mp.fsum(map(mp.fmul, shares, one)) for one in of_classes]
        return divergence_of(name, beta, p, softmax(s, 2))

    check(
        lambda s, *ts: 4 * mp.fsum(map(row, s, *ts)) / 2,
        (student, *teachers),
        *oracle.soft_target(
            student, teachers, temperature=2.0, teacher_weights=weights, divergence=name, beta=beta
        ),
    )


@pytest.mark.parametrize(("name", "beta"), DIVERGENCES)
def test_divergences_of_sides_that_nearly_agree(numbers, name, beta):
    student = numbers(1, 3)
    teacher = student + 1e-6 * numbers(1, 3)
    found, gradients = oracle.soft_target(student, teacher, divergence=name, beta=beta)

    def loss(s, t):
        return divergence_of(name, beta, softmax(t[0]), softmax(s[0]))

    arrays = [np.vectorize(mp.mpf, otypes=[object])(x) for x in (student, teacher)]
    assert abs(found - float(loss(*arrays))) < 1e-15
    for actual, expected in zip(gradients, derivatives(loss, student, teacher), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-15)


@pytest.mark.parametrize(("name", "beta"), DIVERGENCES)
def test_divergences_are_limits_where_a_side_excludes_a_class(numbers, name, beta):
    """Of probabilities that go to 0; but for the divergences that go to infinity with them."""
    student, teacher = numbers(1, 4), numbers(1, 4)
    keywords = {"divergence": name, "beta": beta}
    for sides in ([student], [teacher], [student, teacher]):
        for side in sides:
            side[:, 1] = -1e3
        near, near_gradients = oracle.soft_target(student, teacher, **keywords)
        for side in sides:
            side[:, 1] = -np.inf
        found, gradients = oracle.soft_target(student, teacher, **keywords)
        if np.isfinite(found):
            np.testing.assert_allclose(found, near)
            for one, other in zip(gradients, near_gradients, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-15)
        else:
            assert near > 1
        for side in (student, teacher):
            side[:, 1] = 0.5


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_distillation(numbers, smoothing):
    student, teacher, labels = 3 * numbers(3, 4), 3 * numbers(3, 4), np.array([1, -100, 3])

    def loss(s, t):
        total = mp.mpf(0)
        for row in (0, 2):
            log_q = [mp.log(q) for q in softmax(s[row])]
            smooth = mp.fsum(log_q) / 4
            hard = -(1 - smoothing) * log_q[labels[row]] - smoothing * smooth
            total += (hard * 2 + 5 * 9 * kl(t[row], s[row], 3)) / 2
        return total

    (value, hard, soft), gradients = oracle.distillation(
        student, teacher, labels, temperature=3.0, soft_weight=5.0, hard_weight=2.0,
        label_smoothing=smoothing,
    )  # fmt: skip
    check(loss, (student, teacher), value, gradients)
    np.testing.assert_allclose(value, 2 * hard + 5 * soft)


def mp_map(sample, kind, p):
    columns = [[abs(mp.mpf(x)) for x in column] for column in np.transpose(sample)]
    raw = [max(c) ** p if kind == "max_pow" else mp.fsum(x**p for x in c) for c in columns]
    norm = mp.sqrt(mp.fsum(x**2 for x in raw))
    return [x / norm for x in raw]


@pytest.mark.parametrize(("kind", "p"), [("sum", 1.0), ("sum_pow", 2.7), ("max_pow", 3.0)])
@pytest.mark.parametrize(
    ("distance", "order"),
    [("norm", 1.0), ("norm", 2.0), ("norm", 3.5), ("norm", np.inf), ("mse", 2.0)],
)
def test_attention_transfer(numbers, kind, p, distance, order):
    student, teacher = numbers(2, 3, 4), numbers(2, 2, 4)

    def loss(s, t):
        total = mp.mpf(0)
        for one, other in zip(s, t, strict=True):
            maps = mp_map(one, kind, p), mp_map(other, kind, p)
            d = [abs(a - b) for a, b in zip(*maps, strict=True)]
            if distance == "mse":
                total += mp.fsum(x**2 for x in d) / 4 * 10
            else:
                total += 5 * (
                    max(d)
                    if order == np.inf
                    else mp.fsum(x**order for x in d) ** (1 / mp.mpf(order))
                )
        return total / 2

    value, gradients = oracle.attention_transfer(
        [student], [teacher], kind=kind, p=p, distance=distance, order=order, beta=10.0
    )
    check(loss, (student, teacher), value, gradients)


def test_attention_map(numbers):
    # A sum without cancellation, which would magnify the rounding of its terms.
    features, upstream = numbers(2, 3, 2, 2), np.abs(numbers(2, 4))

    def loss(x):
        maps = [mp_map(np.reshape(sample, (3, 4)), "sum_pow", 2) for sample in x]
        return mp.fsum(mp.fsum(u * q) for u, q in zip(upstream, np.array(maps), strict=True))

    q, gradients = oracle.attention_map(features, upstream)
    check(loss, (features,), (q * upstream).sum(), gradients)


def test_hint_with_regressor(numbers):
    arrays = numbers(2, 3, 2), numbers(2, 4, 2), numbers(4, 3), numbers(4)

    def loss(s, t, weight, bias):
        guided = np.array([np.dot(weight, sample) + bias[:, None] for sample in s])
        return ((guided - t) ** 2).sum() / 4

    value, gradients = oracle.hint(
        [arrays[0]], [arrays[1]], arrays[2], arrays[3], reduction="batchmean"
    )
    check(loss, arrays, value, gradients)


def test_pooling_averages_the_bins_of_adaptive_pooling():
    np.testing.assert_array_equal(
        oracle.pooling(5, 2), np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]) / 3
    )


def mp_huber(r, delta):
    return r**2 / 2 if abs(r) <= delta else delta * (abs(r) - mp.mpf(delta) / 2)


def mp_norm(x):
    return mp.sqrt(mp.fsum(a**2 for a in x))


@pytest.mark.parametrize("delta", [1.0, 0.3])
def test_rkd_distance(numbers, delta):
    student, teacher = numbers(4, 2), numbers(4, 3)

    def relative(x):
        d = [mp_norm(a - b) for a in x for b in x]
        positive = [a for a in d if a > 0]
        return [a / (mp.fsum(positive) / len(positive)) for a in d]

    def loss(s, t):
        pairs = zip(relative(s), relative(t), strict=True)
        return mp.fsum(mp_huber(a - b, delta) for a, b in pairs) / 16

    check(loss, (student, teacher), *oracle.rkd_distance(student, teacher, delta=delta))


@pytest.mark.parametrize("delta", [1.0, 0.3])
def test_rkd_angle(numbers, delta):
    student, teacher = numbers(3, 2), numbers(3, 3)

    def cosine(x, i, j, k):
        one, other = x[j] - x[i], x[k] - x[i]
        return mp.fsum(one * other) / (mp_norm(one) * mp_norm(other)) if i not in (j, k) else 0

    def loss(s, t):
        angles = list(np.ndindex(3, 3, 3))
        return mp.fsum(mp_huber(cosine(s, *a) - cosine(t, *a), delta) for a in angles) / 27

    check(loss, (student, teacher), *oracle.rkd_angle(student, teacher, delta=delta))


def test_similarity(numbers):
    student, teacher = numbers(3, 2, 2), numbers(3, 2)

    def rows(x):
        gram = [[mp.fsum(np.ravel(a) * np.ravel(b)) for b in x] for a in x]
        return [g / mp_norm(row) for row in gram for g in row]

    def loss(s, t):
        return mp.fsum((a - b) ** 2 for a, b in zip(rows(s), rows(t), strict=True)) / 9

    check(loss, (student, teacher), *oracle.similarity(student, teacher))


def test_fsp(numbers):
    arrays = numbers(2, 2, 3, 2), numbers(2, 3, 2, 2), numbers(2, 2, 2, 3), numbers(2, 3, 2, 3)

    def flow(first, second):
        # Of 3 rows or columns, bins of two that share the one in the middle.
        if first.shape[2:] == (3, 2):
            first = np.maximum(first[:, :, :2], first[:, :, 1:])
        return np.array([[(a * b).mean() for b in y for a in x] for x, y in zip(first, second)])  # noqa: B905

    def loss(*x):
        return ((flow(*x[:2]) - flow(*x[2:])) ** 2).sum() / 2

    check(loss, arrays, *oracle.fsp([arrays[:2]], [arrays[2:]]))
