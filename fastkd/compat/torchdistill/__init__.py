"""torchdistill's losses (`torchdistill.losses.mid_level`, version 1.1) on fastkd.

`KDLoss`, `LogitStdKDLoss`, `SKDInstanceLoss`, `SRDLoss`, `ATLoss`, `FSPLoss`, `RKDLoss`, `SPKDLoss`
and `HierarchicalContextLoss`. `register()` puts them into torchdistill's registry under these
names, so that its configurations build them and need no change. A configuration may call it itself:
`fastkd: !import_call {key: fastkd.compat.torchdistill.register}`.

Modules are called as torchdistill calls them, `criterion(student_io_dict, teacher_io_dict,
targets)`: the outputs of hooks, by the path of a module and by "input" or "output". Its other
losses have formulas for which fastkd has no kernel, such as the cosines of `DISTLoss` and the L1
distance of `FTLoss`, and stay torchdistill's. See `fastkd.compat` for what all modules share.

Example:
    >>> from fastkd.compat.torchdistill import KDLoss
    >>> criterion = KDLoss("fc", "output", "fc", "output", temperature=4.0, alpha=0.1)
    >>> outputs = [{"fc": {"output": torch.randn(8, 10)}} for _ in ("student", "teacher")]
    >>> loss = criterion(*outputs, torch.randint(10, (8,)))
"""

from fastkd.compat.torchdistill.features import (
    ATLoss,
    FSPLoss,
    HierarchicalContextLoss,
    RKDLoss,
    SPKDLoss,
)
from fastkd.compat.torchdistill.logits import KDLoss, LogitStdKDLoss, SKDInstanceLoss, SRDLoss

__all__ = [
    "ATLoss",
    "FSPLoss",
    "HierarchicalContextLoss",
    "KDLoss",
    "LogitStdKDLoss",
    "RKDLoss",
    "SKDInstanceLoss",
    "SPKDLoss",
    "SRDLoss",
    "register",
]


def register() -> None:
    """Make torchdistill build this module's losses where a configuration names them.

    Raises:
        ImportError: torchdistill is not installed.
    """
    from torchdistill.losses.registry import register_mid_level_loss

    for name in __all__:
        if name != "register":
            register_mid_level_loss(globals()[name])
