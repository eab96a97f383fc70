"""Similarity-preserving distillation (Tung & Mori 2019)."""

import torch
from torch import Tensor

from fastkd.precision import compute_dtype, widest_dtype
from fastkd.product import product

EPS = 1e-12


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`‖Q_S − Q_T‖_F² / B²`, Q the Gram matrices with rows of norm 1, in float64 where there is."""
    dtype = compute_dtype(student, teacher)
    difference = _similarities(student.to(dtype)) - _similarities(teacher.to(dtype))
    return (difference.square().sum() / max(len(student) ** 2, 1)).to(dtype)


def _similarities(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    gram = product(rows, rows.mT).to(widest_dtype(features.device))
    # The gradient of a row of zeros is 0, and not that of a division by EPS.
    is_zero = (gram == 0).all(1, keepdim=True)
    norm = torch.linalg.vector_norm(gram.masked_fill(is_zero, 1), dim=1, keepdim=True)
    return (gram / norm.clamp_min(EPS)).masked_fill(is_zero, 0)
