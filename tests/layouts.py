"""The same shapes in other memory layouts. What lies between the elements is NaN."""

import math
import mmap

import torch


def contiguous(x):
    return x.contiguous()


def reversed_dims(x):
    axes = tuple(reversed(range(x.ndim)))
    return x.permute(axes).contiguous().permute(axes)


def _within(x, shape, index):
    view = x.new_full(shape, torch.nan)[index]
    return view.copy_(x)


def sliced(x):
    """As `logits[..., 1:-2]`: rows of stride 1 that start at any alignment."""
    inner = slice(1, x.shape[-1] + 1)
    return _within(x, (*x.shape[:-1], x.shape[-1] + 3), (..., inner))


def cropped(x):
    """Cut out along every dimension: dense along the last one only."""
    inner = tuple(slice(1, size + 1) for size in x.shape)
    return _within(x, [size + 2 for size in x.shape], inner)


def stepped(x):
    return _within(x, [2 * size for size in x.shape], (slice(None, None, 2),) * x.ndim)


def expanded(x):
    """One sample for all: stride 0."""
    return x[:1].expand_as(x)


def flat(x):
    """One number for all of the last dimension: stride 0 there."""
    return x[..., :1].expand_as(x)


def channels_last(x):
    """The channels innermost, in any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def beginning_at(x, first, width):
    """The same rows inside of longer ones; what lies between them is NaN."""
    wide = x.new_full((*x.shape[:-1], width), math.nan)
    return wide[..., first : first + x.shape[-1]].copy_(x)


def far_apart(x, distance):
    """So far from sample to sample; little of the memory between them is ever touched."""
    size = (len(x) - 1) * distance + x[0].numel()
    if torch.get_default_device().type == "cpu":
        pages = mmap.mmap(-1, size * x.dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=x.dtype)
    else:
        memory = torch.empty(size, dtype=x.dtype)
    return memory.as_strided(x.shape, (distance, *x.stride()[1:])).copy_(x)


GENERAL = (contiguous, reversed_dims, sliced, cropped, stepped, expanded, flat)
FEATURES = (contiguous, channels_last, cropped, stepped, reversed_dims, expanded)
