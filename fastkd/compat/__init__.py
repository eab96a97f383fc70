"""Other libraries' losses by their own names, computed by fastkd.

One module for each library. Its classes and functions have the library's names, arguments, defaults
and results, so that a program changes its imports and nothing else; the library itself need not be
installed. `docs/migration.md` shows each, before and after.

| module | stands for |
|---|---|
| `fastkd.compat.distillkit` | DistillKit: KL, JSD and TVD, of a whole teacher or of k classes |
| `fastkd.compat.kd_lib` | KD_Lib: its modules of losses, and its trainers' `calculate_kd_loss` |
| `fastkd.compat.liger` | Liger-Kernel: KL, JSD and TVD, of probabilities or of linear layers |
| `fastkd.compat.mdistiller` | mdistiller: the losses of KD, AT, FitNet, ReviewKD, RKD and SP |
| `fastkd.compat.modelopt` | Model-Optimizer: its losses of logits, those for Megatron among them |
| `fastkd.compat.repdistiller` | RepDistiller: `distiller_zoo` |
| `fastkd.compat.torchdistill` | torchdistill: losses of its registry, and `register()` |
| `fastkd.compat.trl` | TRL: `generalized_jsd_loss`, and those of its trainers |

Nothing is loaded before its module is imported: `import fastkd.compat.repdistiller`.

Where a library departs from the paper, its module here departs in the same way, and the docstring
says what fastkd's own function does instead. These differences are common to all modules:

- Losses are float32 (float64 for float64 inputs), also where half precision or autocast goes in.
- Where a library raises an error without need, or returns NaN, such as for an empty batch or a
  class that both sides exclude by `-inf`, a loss here may be a number.
- Attention maps whose norm is nearly 0 are divided by 1e-12: the libraries' norms are those of
  means over the channels, and fastkd's those of sums.
- A method that the library's loss calls, such as `RKDLoss.pdist` or `Attention.at`, is not here or
  not called. Overriding it has no effect.
- `fastkd.use_backend` picks the implementation; no class here has an argument for it.
"""
