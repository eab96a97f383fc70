"""Parameters in Python, in the operators' schemas and in the compiled module are the same."""

import importlib
import inspect

import pytest
from conftest import BACKENDS

from fastkd import operators, parameters
from fastkd.kernels import compiled

KINDS = [
    kind
    for _, kind in inspect.getmembers(parameters, inspect.isclass)
    if kind.__module__ == parameters.__name__
]
# Those whose fields kernels take one by one, or not at all.
WITHOUT_STRUCT = {parameters.Heads, parameters.Rkd}
CHOICES = {
    "divergence": ("forward_kl", "reverse_kl", "jsd", "tvd"),
    "kind": ("sum", "sum_pow", "max_pow"),
    "distance": ("norm", "mse"),
    "reduction": ("none", "sum", "mean", "batchmean"),
    "teacher_is": ("logits", "probabilities", "log_probabilities"),
}


def values(kind, draw):
    """Other ones for every field, so that none is taken for another."""
    of_types = {
        bool: lambda _: draw % 2 == 1,
        float: lambda i: i + 0.5,
        int: lambda i: i,
        tuple[float, ...]: lambda i: (i, 0.25),
        int | None: lambda i: i,
    }
    hints = inspect.get_annotations(kind, eval_str=True)
    for i, (name, hint) in enumerate(hints.items()):
        if hint is str:
            choices = CHOICES.get(name, ("native",))
            yield choices[draw % len(choices)]
        else:
            yield of_types[hint](i)


@pytest.mark.skipif("native" not in BACKENDS, reason="native is not under test")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_STRUCT])
def test_the_module_has_the_same_fields(kind):
    for draw in range(4):
        p = kind(*values(kind, draw))
        struct = compiled.struct_of(p)
        for name, value in p._asdict().items():
            if name not in parameters.OF_OPERATORS:
                found = getattr(struct, name)
                assert (tuple(found) if isinstance(value, tuple) else found) == value, name


@pytest.mark.skipif("native" not in BACKENDS, reason="native is not under test")
def test_the_module_takes_no_other_fields():
    transfer = compiled.loaded().Transfer
    fields = {"distance": "norm", "order": 2.0, "beta": 1.0, "reduction": "sum"}
    transfer(**fields)
    with pytest.raises(TypeError):
        transfer(**fields, gamma=1.0)
    with pytest.raises(KeyError, match="order"):
        transfer(**{name: value for name, value in fields.items() if name != "order"})
    with pytest.raises(ValueError, match="median"):
        transfer(**{**fields, "reduction": "median"})
    with pytest.raises(TypeError):
        transfer("norm", 2.0, 1.0, "sum")


def test_schemas_end_with_the_fields():
    importlib.import_module("fastkd.nn")  # whose losses define their operators
    importlib.import_module("fastkd.ops.metrics")  # which are no loss
    of_operators = {
        "soft_target_": (parameters.SoftTarget,),
        "distillation_metrics": (parameters.Metrics,),
        "attention_transfer_forward": (parameters.Transfer, parameters.Map),
        "attention_map_forward": (parameters.Map,),
        "hint_": (parameters.Hint,),
        "rkd_forward": (parameters.Rkd,),
    }
    for start, kinds in of_operators.items():
        fields = [field for kind in kinds for field in kind._fields]
        found = [name for name in operators.OPERATORS if name.startswith(start)]
        assert found
        for name in found:
            schema = operators.OPERATORS[name]._schema
            arguments = [a.name for a in schema.arguments if a.name != "numbers"]
            assert arguments[-len(fields) :] == fields


def test_lists_of_the_dispatcher_become_tuples():
    fields = [
        2.0,
        2.0,
        1.0,
        0.0,
        0.0,
        -100,
        True,
        "jsd",
        0.5,
        "sum",
        1,
        [0.5, 0.5],
        None,
        "native",
        "logits",
        0,
        0.0,
        0.0,
    ]
    p = parameters.from_schema(parameters.SoftTarget, fields)
    assert p.weights == (0.5, 0.5)
    assert hash(p)


def test_no_field_has_a_default():
    kinds = [x for x in vars(parameters).values() if hasattr(x, "_field_defaults")]
    assert parameters.SoftTarget in kinds
    assert not any(kind._field_defaults for kind in kinds)
