"""fastkd in other libraries' training loops, a module for each loop.

| module | has |
|---|---|
| `fastkd.integrations.lightning` | `DistillationMixin`, for a `LightningModule` |
| `fastkd.integrations.timm` | `LogitDistillationTask`, for timm's task interface |
| `fastkd.integrations.transformers` | `DistillationTrainer`, a trainer with a teacher |
| `fastkd.integrations.trl` | `DistillationTrainer`, TRL's own with fastkd's divergence |
| `fastkd.integrations.trl_gkd` | `GKDTrainer`, TRL's own with fastkd's divergence |

Nothing is loaded before its module is imported, which needs the library. Each library has an extra
of its name, such as `fastkd[trl]`.
"""
