"""Every public function and module has an example in its docstring, and each example runs."""

import doctest
import inspect
import re
import warnings

import pytest
import torch

import fastkd
import fastkd.nn

MODULES = [getattr(fastkd.nn, name) for name in fastkd.nn.__all__]
# Neither a module's name nor a tuple that a function returns has an example of its own.
NOT_CALLED = ("nn", "DistillationMetrics", "DistillationParts")
PUBLIC = [getattr(fastkd, name) for name in fastkd.__all__ if name not in NOT_CALLED]
FUNCTIONS = [value for value in PUBLIC if inspect.isfunction(value)]


@pytest.mark.parametrize("value", [*PUBLIC, *MODULES], ids=lambda value: value.__name__)
def test_the_example_runs(value):
    globs = {"fastkd": fastkd, "torch": torch}
    found = doctest.DocTestFinder(recurse=False).find(value, value.__name__, globs=globs)
    assert [example for test in found for example in test.examples]
    with warnings.catch_warnings():
        results = [doctest.DocTestRunner().run(test) for test in found]
    assert [result.failed for result in results] == [0]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_each_default_is_said(function):
    """In prose, with the argument that it belongs to."""
    # Python 3.13 and newer strip a docstring's indentation, which `getdoc` does everywhere.
    arguments = inspect.getdoc(function).partition("Args:\n")[2].partition("\n\n")[0]
    described = re.split(r"^    (\w+):", arguments, flags=re.MULTILINE)
    described = dict(zip(described[1::2], described[2::2], strict=True))
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            said = re.search(r"Default:\s+([^\s,]+)", described[parameter.name])
            assert said, parameter.name
            assert said[1].removesuffix(".").strip('`"') == str(parameter.default)
