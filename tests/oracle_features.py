"""Attention maps, attention transfer and hints as the papers state them, in NumPy float64.

Nothing here comes from fastkd. Functions take lists where losses take pairs, and return what those
of `oracle` do.
"""

import numpy as np


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


def of_pairs(weights, pairs):
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
    weights = weight * of_pairs(pair_weights, students)
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
    scales = (0.5 if half else 1.0) * of_pairs(pair_weights, students)
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
