"""`import fastkd` is cheap, and needs neither Triton nor the compiled module."""

import subprocess
import sys
from pathlib import Path

import pytest

EVERY_NAME = "for name in fastkd.__all__: getattr(fastkd, name)"


def python(code: str, *path: Path) -> str:
    lines = [*(f"import sys; sys.path.insert(0, {str(folder)!r})" for folder in path), code]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_beyond_torch_but_fastkd() -> None:
    """Which keeps it within some 50 ms; the compiled module comes with the first call."""
    # torch itself may load Triton where it is installed, so only what is new counts.
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        f"import fastkd\n{EVERY_NAME}\n"
        "print(*sys.modules.keys() - before)"
    )
    new = python(code).split()
    assert "fastkd.dispatch" in new
    assert not [name for name in new if "_native" in name]
    roots = {name.split(".")[0] for name in new}
    assert roots - {"fastkd"} <= sys.stdlib_module_names


def test_integrations_load_no_other_library() -> None:
    libraries = "{'lightning', 'timm', 'transformers', 'trl'}"
    python(f"import sys, fastkd.integrations\nassert not {libraries} & sys.modules.keys()")


@pytest.mark.parametrize("fault", ["raise ImportError('missing')", "raise RuntimeError('broken')"])
def test_broken_triton_breaks_nothing(fault: str, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text(fault)
    python(
        "import torch, fastkd\n"
        "student, teacher = torch.randn(2, 8, 10)\n"
        "assert fastkd.soft_target_loss(student, teacher).isfinite()",
        tmp_path,
    )
