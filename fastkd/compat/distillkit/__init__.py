"""DistillKit's losses of logits (arcee-ai/DistillKit, `distillkit/lossfuncs`) on fastkd.

`KLDLoss`, `JSDLoss` and `TVDLoss`, with their functions of a whole teacher (`dense_kl_div`,
`dense_js_div`, `dense_tvd`) and of one that kept k classes (`sparse_kl_div`, `sparse_js_div`,
`sparse_tvd`). Its losses of rankings, hinges and hidden states stay DistillKit's. See
`fastkd.compat` for what all modules share.

The values v of k classes that a teacher computed at a temperature G are softened to T, with
`a = G/T`:

| missing | v | the teacher's p | `fastkd.TopK` |
|---|---|---|---|
| `ZERO` | any | `softmax(a v)`, and 0 for other classes | `tail="renormalize"` |
| `SYMMETRIC_UNIFORM` | log-probabilities | the ratios of all `exp(a v)` and, for all other \
classes as one, `(1 − Σ exp v)^a` | `tail="bucket"` |

`ZERO` is not what `TopK` calls `"zero"`. The power of the rest is not the sum of the powers of the
classes in it, unless a is 1. DistillKit leaves out what is below its `eps` of 1e-8; here that
counts. A teacher of k classes receives no gradient.

Example:
    >>> from types import SimpleNamespace
    >>> from fastkd.compat.distillkit import KLDLoss, sparse_js_div
    >>> logits = torch.randn(2, 8, 100, requires_grad=True)
    >>> values, ids = torch.randn(2, 8, 100).log_softmax(-1).topk(16)
    >>> sparse_js_div(logits, ids, values, temperature=2.0).backward()
    >>> signal = SimpleNamespace(logits=torch.randn(2, 8, 100))
    >>> loss = KLDLoss(temperature=2.0)(SimpleNamespace(logits=logits), signal)
"""

from fastkd.compat.distillkit.functions import (
    MissingProbabilityHandling,
    dense_js_div,
    dense_kl_div,
    dense_tvd,
    sparse_js_div,
    sparse_kl_div,
    sparse_tvd,
)
from fastkd.compat.distillkit.losses import JSDLoss, KLDLoss, TVDLoss

__all__ = [
    "JSDLoss",
    "KLDLoss",
    "MissingProbabilityHandling",
    "TVDLoss",
    "dense_js_div",
    "dense_kl_div",
    "dense_tvd",
    "sparse_js_div",
    "sparse_kl_div",
    "sparse_tvd",
]
