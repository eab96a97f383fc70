"""The equations as the papers state them, in NumPy float64, with derivatives worked out by hand.

Nothing here comes from fastkd. Every function takes arrays and the `grad_output` of the loss and
returns `(loss, gradients)`, the gradients in the order of the array arguments.
"""

import numpy as np
import oracle_divergence
import oracle_temperatures

# Logits are multiplied by this first, so that any two finite ones have a finite difference. A power
# of 2 rounds nothing.
SCALE = 2.0**-70


def log_softmax(x, temperature=1.0):
    """`T log softmax(x/T)`, times SCALE. Huge logits lose nothing to the division by T."""
    shifted = x * SCALE - x.max(-1, keepdims=True) * SCALE
    exponentials = np.exp(shifted / (temperature * SCALE))
    return shifted - temperature * SCALE * np.log(exponentials.sum(-1, keepdims=True))


def divergence_rows(
    student, teachers, weights, temperatures, magnitudes=False, divergence="forward_kl", beta=0.5
):
    """T D(p, q) of each row, and D's derivatives by s/T and by each teacher's t/T_t.

    `temperatures` are T and T_t, one for each row. All are times SCALE. p is the weighted mean of
    the teachers' probabilities; those of weight 0 are not there. With `magnitudes` the terms of a
    derivative are added up where they are subtracted: what rounding errors are measured against.
    """
    temperature, teacher_temperature = temperatures
    log_q = log_softmax(student, temperature)
    ratio = temperature / teacher_temperature
    logs = [log_softmax(x, teacher_temperature) * ratio for x in teachers]
    scale = temperature * SCALE
    counted = [i for i, weight in enumerate(weights) if weight]
    log_p = logs[counted[0]]
    if len(counted) > 1:
        log_p = scale * np.logaddexp.reduce([np.log(weights[i]) + logs[i] / scale for i in counted])
    of_counted = log_p, [logs[i] for i in counted], [weights[i] for i in counted], log_q
    if divergence == "jsd" and beta in (0, 1):  # a convention, and no limit
        divergence = "reverse_kl" if beta else "forward_kl"
    if divergence.startswith("skew_") and beta == 0:
        divergence = {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}[divergence]
    if divergence == "forward_kl":
        rows, to_student, found = forward_kl_rows(*of_counted, scale, magnitudes)
    elif divergence == "reverse_kl":
        rows, to_student, found = oracle_divergence.reverse_kl_rows(*of_counted, scale, magnitudes)
        to_student = to_student / temperature
        found = [x * SCALE for x in found]
    else:
        log_p, logs, of_them, log_q = of_counted
        logarithms = log_p / scale, [x / scale for x in logs], of_them, log_q / scale
        rows, to_student, found = oracle_divergence.bounded_rows(
            divergence, beta, *logarithms, magnitudes
        )
        rows, to_student, found = (
            rows * scale[..., 0],
            to_student * SCALE,
            [x * SCALE for x in found],
        )
    to_teachers = [np.zeros_like(x) for x in teachers]
    for i, gradient in zip(counted, found, strict=True):
        to_teachers[i] = gradient
    return rows, to_student, to_teachers


def forward_kl_rows(log_p, logs, weights, log_q, scale, magnitudes):
    """The same of KL(p‖q); the logarithms are times `scale`."""
    p, q = np.exp(log_p / scale), np.exp(log_q / scale)
    is_excluded = log_p == -np.inf
    ratio = np.where(is_excluded, 0, log_p) - np.where(is_excluded, 0, log_q)
    # Where p underflows its logarithm may be -inf. A class that only the student excludes still is
    # infinite then.
    rows = np.where(ratio == np.inf, np.inf, np.where(p == 0, 0 * q, p * ratio)).sum(-1)
    to_teachers = []
    for w, log in zip(weights, logs, strict=True):
        share = np.exp(log / scale)
        of_row = np.where(share == 0, 0, share * ratio)
        if magnitudes:
            of_row = np.abs(of_row) + share * scale
            slope = of_row + share * of_row.sum(-1, keepdims=True)
        else:
            slope = of_row - share * of_row.sum(-1, keepdims=True)
        to_teachers.append(w * slope / (scale / SCALE))
    return rows, SCALE * (q + p if magnitudes else q - p), to_teachers


def _ensemble(student, teachers, weights, dim):
    """Arrays with the classes last, a list of teachers, and weights that sum to 1."""
    teachers = teachers if isinstance(teachers, list) else [teachers]
    weights = np.ones(len(teachers)) if weights is None else np.array(weights, dtype=float)
    # NumPy adds up pairs of neighbours only where classes lie side by side.
    student, *teachers = (
        np.ascontiguousarray(np.moveaxis(x, dim, -1)) for x in (student, *teachers)
    )
    weights = weights / weights.max()
    return student, teachers, weights / weights.sum()


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def soft_target(
    student, teachers, grad_output=1.0, *, temperature=1.0, teacher_temperature=None,
    scale_t2=True, reduction="batchmean", dim=-1, divergence="forward_kl", beta=0.5, mask=None,
    teacher_weights=None, magnitudes=False,
):  # fmt: skip
    """Takes a teacher or a list of them; the gradients are the student's, then all teachers'.

    After these come the gradients of temperatures that are arrays.
    """
    student, teachers, weights = _ensemble(student, teachers, teacher_weights, dim)
    kept = np.ones(student.shape[:-1], dtype=bool) if mask is None else np.asarray(mask)
    of_rows = oracle_temperatures.of_rows(temperature, teacher_temperature, kept.shape)
    of_rows = [t[kept] for t in of_rows]
    of_kept = [x[kept] for x in (student, *teachers)]
    rows, *found = divergence_rows(
        of_kept[0], of_kept[1:], weights, of_rows, magnitudes, divergence, beta
    )
    slopes = [found[0], *found[1]]
    weight = of_rows[0] if scale_t2 else 1 / of_rows[0]
    count = kept.sum()
    divisor = {"none": 1, "sum": 1, "batchmean": count, "mean": count * student.shape[-1]}
    weight = weight / max(divisor[reduction], 1)
    losses = np.zeros(kept.shape)
    losses[kept] = rows * weight[..., 0]
    loss = losses / SCALE if reduction == "none" else np.sum(losses) / SCALE
    weight = np.broadcast_to(grad_output, kept.shape)[kept][..., None] * weight
    gradients = [np.zeros_like(x) for x in (student, *teachers)]
    for i, (gradient, slope) in enumerate(zip(gradients, slopes, strict=True)):
        gradient[kept] = (weight * of_rows[0] / of_rows[1] if i else weight) * slope / SCALE
    by_temperatures = [np.zeros(kept.shape), np.zeros(kept.shape)]
    found = oracle_temperatures.derivatives(
        rows / SCALE, [x / SCALE for x in slopes], of_kept, of_rows, weight[..., 0], scale_t2,
        magnitudes,
    )  # fmt: skip
    for gradient, of_row in zip(by_temperatures, found, strict=True):
        gradient[kept] = of_row
    gradients = [np.moveaxis(g, -1, dim) for g in gradients]
    of_arguments = oracle_temperatures.of_arguments
    return loss, [*gradients, *of_arguments(by_temperatures, temperature, teacher_temperature)]


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def distillation(
    student, teachers, labels, grad_output=1.0, *, temperature=4.0, teacher_temperature=None,
    soft_weight=0.9, hard_weight=0.1, ignore_index=-100, label_smoothing=0.0,
    reduction="batchmean", dim=-1, divergence="forward_kl", beta=0.5, teacher_weights=None,
    magnitudes=False,
):  # fmt: skip
    """As the others; the loss is `(loss, hard, soft)`, each reduced."""
    student, teachers, weights = _ensemble(student, teachers, teacher_weights, dim)
    kept = labels != ignore_index
    classes = student.shape[-1]
    count = max(kept.sum(), 1) if reduction == "batchmean" else 1
    gradients = [np.zeros_like(x) for x in (student, *teachers)]
    s = student[kept]

    log_q = log_softmax(s)
    target = np.full(s.shape, label_smoothing / classes)
    target[np.arange(len(s)), labels[kept]] += 1 - label_smoothing
    hard = -np.where(target > 0, target * log_q, 0).sum(-1) / count
    of_rows = oracle_temperatures.of_rows(temperature, teacher_temperature, kept.shape)
    of_rows = [t[kept] for t in of_rows]
    of_kept = [s, *(t[kept] for t in teachers)]
    rows, soft_to_student, soft_to_teachers = divergence_rows(
        s, of_kept[1:], weights, of_rows, magnitudes, divergence, beta
    )
    soft = of_rows[0][..., 0] * rows / count

    def reduced(rows):
        if reduction != "none":
            return rows.sum()
        of_all = np.zeros(labels.shape)
        of_all[kept] = rows
        return of_all

    hard, soft = reduced(hard), reduced(soft)
    # A term of weight 0 is not there, also where it is infinite.
    loss = sum(w * part for w, part in ((hard_weight, hard), (soft_weight, soft)) if w)
    loss = loss + np.zeros(labels.shape if reduction == "none" else ())
    if hard_weight:
        q = np.exp(log_q / SCALE)
        gradients[0][kept] += hard_weight * (q + target if magnitudes else q - target)
    by_temperatures = [np.zeros(kept.shape), np.zeros(kept.shape)]
    if soft_weight:
        weight = soft_weight * of_rows[0]
        gradients[0][kept] += weight * soft_to_student / SCALE
        for gradient, soft_gradient in zip(gradients[1:], soft_to_teachers, strict=True):
            gradient[kept] += weight * of_rows[0] / of_rows[1] * soft_gradient
        slopes = [x / SCALE for x in (soft_to_student, *soft_to_teachers)]
        found = oracle_temperatures.derivatives(
            rows / SCALE, slopes, of_kept, of_rows, weight[..., 0], True, magnitudes
        )
        for gradient, of_row in zip(by_temperatures, found, strict=True):
            gradient[kept] = of_row
    upstream = np.broadcast_to(grad_output, labels.shape)[..., None] / count
    by_temperatures = [g * upstream[..., 0] for g in by_temperatures]
    gradients = [g * upstream for g in gradients]
    gradients[1:] = [g / SCALE for g in gradients[1:]]
    gradients = [np.moveaxis(g, -1, dim) for g in gradients]
    of_arguments = oracle_temperatures.of_arguments
    gradients += of_arguments(by_temperatures, temperature, teacher_temperature)
    return (loss / SCALE, hard / SCALE, soft / SCALE), gradients


def _raw_map(features, kind, p):
    """F of `(B, C, positions)`, and the function that carries a gradient of F to the features."""
    p = p if p is not None else 1.0 if kind == "sum" else 2.0
    magnitude = np.abs(features)
    slope = p * magnitude ** (p - 1) * np.sign(features)
    if kind == "max_pow":
        argmax = magnitude.argmax(1)[:, None]
        slope = np.where(np.arange(features.shape[1])[:, None] == argmax, slope, 0)
        raw = magnitude.max(1) ** p
    else:
        raw = (magnitude**p).sum(1)
    return raw, lambda gradient: gradient[:, None] * slope


def _map(features, kind, p, normalize, eps, channel_dim):
    moved = np.moveaxis(features, channel_dim, 1)
    raw, to_features = _raw_map(moved.reshape(*moved.shape[:2], np.prod(moved.shape[2:])), kind, p)
    norm = np.sqrt((raw**2).sum(1, keepdims=True))
    q = raw / np.maximum(norm, eps) if normalize else raw

    def back(gradient):
        if normalize:
            radial = np.where(norm > eps, q * (q * gradient).sum(1, keepdims=True), 0)
            gradient = (gradient - radial) / np.maximum(norm, eps)
        return np.moveaxis(to_features(gradient).reshape(moved.shape), 1, channel_dim)

    return q, back


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def attention_map(
    features, grad_output=1.0, *, kind="sum_pow", p=None, normalize=True, eps=1e-12, channel_dim=1
):
    q, back = _map(features, kind, p, normalize, eps, channel_dim)
    return q, [back(np.broadcast_to(grad_output, q.shape))]


def _distance(difference, distance, order):
    """One number per sample, and its derivative towards the difference."""
    if distance == "mse":
        return (difference**2).mean(1), 2 * difference / difference.shape[1]
    order = 2.0 if order is None else order
    magnitude, sign = np.abs(difference), np.sign(difference)
    largest = magnitude.max(1, keepdims=True)
    if order == np.inf:
        ties = (magnitude == largest).astype(float)
        return largest[:, 0], sign * ties / ties.sum(1, keepdims=True)
    # Scaled by the largest element, so that high orders neither overflow nor underflow.
    scaled = magnitude / np.where(largest > 0, largest, 1)
    norm = (scaled**order).sum(1, keepdims=True) ** (1 / order)
    slope = sign * (scaled / np.where(norm > 0, norm, 1)) ** (order - 1)
    return (largest * norm)[:, 0], slope


def _of_pairs(weights, pairs):
    return np.ones(len(pairs)) if weights is None else np.array(weights, dtype=float)


def pooling(size, to):
    """The matrix that averages `size` positions into `to` bins, as adaptive pooling does."""
    matrix = np.zeros((to, size))
    for i in range(to):
        start, end = i * size // to, -(-(i + 1) * size // to)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def _pooled(features, height, width):
    if features.shape[2:] == (height, width):
        return features, lambda gradient: gradient
    rows, columns = pooling(features.shape[2], height), pooling(features.shape[3], width)
    return rows @ features @ columns.T, lambda gradient: rows.T @ gradient @ columns


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def attention_transfer(
    students, teachers, grad_output=1.0, *, kind="sum_pow", p=None, distance="norm", order=None,
    beta=1.0, pair_weights=None, resize=None, reduction="mean", eps=1e-12, channel_dim=1,
):  # fmt: skip
    """Takes lists; the gradients are all students', then all teachers'."""
    batch = students[0].shape[0]
    weight = beta / 2 if distance == "norm" else beta
    weight = weight / max(batch, 1) if reduction == "mean" else weight
    weights = weight * _of_pairs(pair_weights, students)
    upstream = np.broadcast_to(grad_output, (len(students), batch)) * weights[:, None]
    losses, to_students, to_teachers = [], [], []
    for pair, weight, student, teacher in zip(upstream, weights, students, teachers, strict=True):
        unpool = [lambda gradient: gradient] * 2
        if resize is not None:
            smaller = np.minimum(student.shape[2:], teacher.shape[2:])
            student, unpool[0] = _pooled(student, *smaller)
            teacher, unpool[1] = _pooled(teacher, *smaller)
        (q_s, back_s), (q_t, back_t) = (
            _map(x, kind, p, True, eps, channel_dim) for x in (student, teacher)
        )
        values, slope = _distance(q_s - q_t, distance, order)
        losses.append(values * weight)
        to_students.append(unpool[0](back_s(pair[:, None] * slope)))
        to_teachers.append(unpool[1](back_t(-pair[:, None] * slope)))
    losses = np.stack(losses)
    return losses if reduction == "none" else losses.sum(), [*to_students, *to_teachers]


def hint(
    students, teachers, weight=None, bias=None, grad_output=1.0, *, pair_weights=None,
    reduction="batchmean", half=True,
):  # fmt: skip
    """Takes lists; the gradients are all students', all teachers', the weight's, the bias's."""
    scales = (0.5 if half else 1.0) * _of_pairs(pair_weights, students)
    losses, to_students, to_teachers, to_weight, to_bias = [], [], [], 0, 0
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        scale = scales[index]
        guided = student
        if weight is not None:
            matrix = weight.reshape(weight.shape[:2])
            guided = np.einsum("ts,bs...->bt...", matrix, student)
            if bias is not None:
                guided = guided + bias.reshape(-1, *[1] * (student.ndim - 2))
        divisor = {"batchmean": len(guided), "mean": guided.size}.get(reduction, 1)
        difference = guided - teacher
        squares = (difference**2).sum(tuple(range(1, difference.ndim)))
        losses.append(scale / max(divisor, 1) * squares)
        upstream = np.broadcast_to(grad_output, (len(students), len(guided)))[index]
        upstream = upstream.reshape(-1, *[1] * (guided.ndim - 1))
        slope = 2 * scale / max(divisor, 1) * upstream * difference
        to_teachers.append(-slope)
        if weight is None:
            to_students.append(slope)
            continue
        to_students.append(np.einsum("ts,bt...->bs...", matrix, slope))
        summed = [0, *range(2, slope.ndim)]
        products = np.tensordot(slope, student, (summed, summed))
        to_weight = to_weight + products.reshape(weight.shape)
        to_bias = to_bias + slope.sum(tuple(summed))
    extra = [g for x, g in ((weight, to_weight), (bias, to_bias)) if x is not None]
    loss = np.stack(losses) if reduction == "none" else sum(x.sum() for x in losses)
    return loss, [*to_students, *to_teachers, *extra]


def _huber(r, delta):
    """Huber's loss and its derivative."""
    return np.where(abs(r) <= delta, r**2 / 2, delta * (abs(r) - delta / 2)), np.clip(
        r, -delta, delta
    )


def _relations(x):
    """`x_j − x_i` as (i, j, D), its length, and what 1/length is by a convention: 0 at 0."""
    differences = x[None] - x[:, None]
    lengths = np.sqrt((differences**2).sum(-1))
    return differences, lengths, np.where(lengths == 0, 0, 1 / np.where(lengths == 0, 1, lengths))


def _to_points(by_difference):
    """A gradient of the differences as one of the points."""
    return by_difference.sum(0) - by_difference.sum(1)


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def rkd_distance(student, teacher, grad_output=1.0, *, delta=1.0):
    sides = [_relations(x) for x in (student, teacher)]
    counts = [max((d > 0).sum(), 1) for _, d, _ in sides]
    means = [d[d > 0].mean() if (d > 0).any() else 1.0 for _, d, _ in sides]
    quotients = [d / m for (_, d, _), m in zip(sides, means, strict=True)]
    losses, slope = _huber(quotients[0] - quotients[1], delta)
    entries = max(losses.size, 1)
    gradients = []
    for sign, (differences, d, inverse), mean, count, quotient in zip(
        (1, -1), sides, means, counts, quotients, strict=True
    ):
        by_quotient = sign * slope * grad_output / entries
        by_distance = by_quotient / mean - (d > 0) * (by_quotient * quotient).sum() / mean / count
        gradients.append(_to_points((by_distance * inverse)[..., None] * differences))
    return losses.sum() / entries, gradients


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def rkd_angle(student, teacher, grad_output=1.0, *, delta=1.0):
    sides = [_relations(x) for x in (student, teacher)]
    units = [differences * inverse[..., None] for differences, _, inverse in sides]
    cosines = [np.einsum("ijd,ikd->ijk", e, e) for e in units]
    losses, slope = _huber(cosines[0] - cosines[1], delta)
    entries = max(losses.size, 1)
    gradients = []
    for sign, (_, _, inverse), e in zip((1, -1), sides, units, strict=True):
        # Each cosine is of two directions, and the slopes are symmetric in them.
        by_unit = 2 * sign * grad_output / entries * np.einsum("ijk,ikd->ijd", slope, e)
        across = by_unit - e * (e * by_unit).sum(-1, keepdims=True)
        gradients.append(_to_points(across * inverse[..., None]))
    return losses.sum() / entries, gradients


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def similarity(student, teacher, grad_output=1.0):
    batch = len(student)
    rows = [x.reshape(batch, np.prod(x.shape[1:], dtype=int)) for x in (student, teacher)]
    grams = [x @ x.T for x in rows]
    norms = [np.sqrt((g**2).sum(1, keepdims=True)) for g in grams]
    q = [g / np.maximum(n, 1e-12) for g, n in zip(grams, norms, strict=True)]
    difference = (q[0] - q[1]) / max(batch, 1)
    gradients = []
    for sign, shape, x, norm, one in zip(
        (1, -1), (student.shape, teacher.shape), rows, norms, q, strict=True
    ):
        by_q = 2 * sign * grad_output / max(batch, 1) * difference
        radial = np.where(norm < 1e-12, 0, one * (one * by_q).sum(1, keepdims=True))
        by_gram = np.where(norm == 0, 0, (by_q - radial) / np.maximum(norm, 1e-12))
        gradients.append(((by_gram + by_gram.T) @ x).reshape(shape))
    return (difference**2).sum(), gradients


def similarities(students, teachers, grad_output=1.0, *, pair_weights=None):
    """Takes lists; the gradients are all students', then all teachers'."""
    weights = _of_pairs(pair_weights, students)
    found = [
        similarity(*pair, weight * grad_output)
        for weight, *pair in zip(weights, students, teachers, strict=True)
    ]
    loss = sum(weight * value for weight, (value, _) in zip(weights, found, strict=True))
    return loss, [gradients[side] for side in range(2) for _, gradients in found]


def _max_pooled(x, height, width):
    """The maxima of adaptive bins, and the function that carries a gradient of them back."""
    pooled, argmax = np.empty((*x.shape[:2], height, width)), {}
    bins = [
        [slice(i * size // to, -(-(i + 1) * size // to)) for i in range(to)]
        for size, to in zip(x.shape[2:], (height, width), strict=True)
    ]
    for i, rows in enumerate(bins[0]):
        for j, columns in enumerate(bins[1]):
            bin = x[:, :, rows, columns]
            flat = bin.reshape(*x.shape[:2], bin.shape[2] * bin.shape[3])
            argmax[i, j] = np.divmod(flat.argmax(-1), bin.shape[3])
            pooled[:, :, i, j] = flat.max(-1)

    def back(gradient):
        to = np.zeros_like(x)
        samples, channels = np.ogrid[: x.shape[0], : x.shape[1]]
        for (i, j), (row, column) in argmax.items():
            at = row + bins[0][i].start, column + bins[1][j].start
            np.add.at(to, (samples, channels, *at), gradient[:, :, i, j])
        return to

    return pooled, back


def fsp(students, teachers, grad_output=1.0, *, pair_weights=None):
    """Takes lists of pairs; the gradients are those of all students' features, then teachers'."""
    loss, to_students, to_teachers = 0.0, [], []
    weights = _of_pairs(pair_weights, students)
    for weight, *pairs in zip(weights, students, teachers, strict=True):
        sides = []
        for first, second in pairs:
            height, width = np.minimum(first.shape[2:], second.shape[2:])
            (one, back), (other, back_other) = (
                _max_pooled(x, height, width) for x in (first, second)
            )
            gram = np.einsum("bchw,bdhw->bcd", one, other) / (height * width)
            sides.append((gram, one, back, other, back_other))
        difference = sides[0][0] - sides[1][0]
        batch = max(len(difference), 1)
        loss += weight * (difference**2).sum() / batch
        for sign, to, (_, one, back, other, back_other) in zip(
            (1, -1), (to_students, to_teachers), sides, strict=True
        ):
            slope = 2 * sign * weight * grad_output * difference / batch / np.prod(one.shape[2:])
            to.append(back(np.einsum("bcd,bdhw->bchw", slope, other)))
            to.append(back_other(np.einsum("bcd,bchw->bdhw", slope, one)))
    return loss, [*to_students, *to_teachers]
