"""Parameters and sizes with which kernels on logits are called by themselves, Triton's mostly."""

from fastkd.parameters import SoftTarget

SUM = SoftTarget(
    temperature=2.0,
    teacher_temperature=2.0,
    soft_weight=4.0,
    hard_weight=0.0,
    label_smoothing=0.0,
    ignore_index=-100,
    labels_are_classes=True,
    divergence="forward_kl",
    beta=0.5,
    reduction="sum",
    dim=1,
    weights=(1.0,),
    num_classes=None,
    backend="triton",
    teacher_is="logits",
    all_classes=0,
    softcap=0.0,
    teacher_softcap=0.0,
)
HARD = SUM._replace(
    soft_weight=0.9 * 4, hard_weight=0.1, label_smoothing=0.1, reduction="batchmean"
)


def around(*sizes):
    return [size + by for size in sizes for by in (-1, 0, 1)]
