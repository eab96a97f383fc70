"""TRL's `GKDTrainer` on fastkd; the extra is `fastkd[trl]`."""

from trl.experimental import gkd

from fastkd.compat.trl import generalized_jsd_loss

__all__ = ["GKDTrainer"]


class GKDTrainer(gkd.GKDTrainer):
    """`trl.experimental.gkd.GKDTrainer` whose divergence fastkd computes.

    Arguments, `GKDConfig` and numbers are TRL's; see `fastkd.compat.trl.generalized_jsd_loss`. The
    trainer hands its logits over as they are, without a temperature.

    Example:
        >>> from trl.experimental.gkd import GKDConfig
        >>> from fastkd.integrations.trl_gkd import GKDTrainer
        >>> trainer = GKDTrainer(
        ...     "Qwen/Qwen2.5-0.5B-Instruct",
        ...     teacher_model="Qwen/Qwen2.5-1.5B-Instruct",
        ...     args=GKDConfig("out"),
        ...     train_dataset=messages,
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    generalized_jsd_loss = staticmethod(generalized_jsd_loss)
