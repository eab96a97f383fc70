"""Which module of fastkd may import which: downwards only, so that none needs what is above it."""

import ast
from pathlib import Path

import pytest

import fastkd

ROOT = Path(fastkd.__file__).parent

# From the ground up. A module may import those of lines above its own, and its neighbours of one
# package. The package itself, which loads names on first use, is not among them.
LAYERS = [
    ["facts", "parameters"],
    ["logits", "ranks", "tensors", "precision", "symbols"],
    ["kernels"],
    ["dispatch", "operators"],
    ["autograd"],
    ["product"],
    ["reference"],
    ["ops"],
    ["regressor", "losses"],
    ["nn"],
    ["compat"],
    ["integrations"],
    ["info"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            yield name, path


MODULES = dict(modules())


def imports(name):
    """Modules of fastkd that a module's text imports, inside functions and conditions, too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fastkd":
            base = node.module.removeprefix("fastkd").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in MODULES else base)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.removeprefix("fastkd.") for n in names if n.startswith("fastkd.")}
    return found - {"", name}


def test_every_module_has_its_layer():
    assert {name.partition(".")[0] for name in MODULES} == set(HEIGHT)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    package = name.partition(".")[0]
    for other in imports(name):
        beside = other.partition(".")[0] == package
        assert beside or HEIGHT[other.partition(".")[0]] < HEIGHT[package], f"{name} -> {other}"


@pytest.mark.parametrize("name", MODULES)
def test_no_circle(name):
    reached, new = set(), imports(name)
    while new:
        reached |= new
        new = set().union(*map(imports, new)) - reached
    assert name not in reached


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_imported_for_types_alone(name):
    assert "TYPE_CHECKING" not in MODULES[name].read_text()


def test_the_ground_imports_nothing_of_fastkd():
    assert not imports("facts") | imports("parameters")
