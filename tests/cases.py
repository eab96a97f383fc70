"""Draws a few of each test's cases before pytest makes items of them all, which takes seconds.

Only those are drawn that the command line's -k and -m let through: a test of which one case may run
keeps one.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

from _pytest.mark import KeywordMatcher, MarkMatcher
from _pytest.mark.expression import Expression


def draw(metafunc: Any, count: int, seed: int, runs: Callable[[Any], bool]) -> None:
    """Leave at most `count` of the parameter sets for which `runs` is true.

    When hooks have added all parameter sets pytest has no public way to take some back.
    """
    calls = metafunc._calls
    if len(calls) <= count:
        return
    order = random.Random(f"{seed} {metafunc.definition.nodeid}").sample(calls, len(calls))
    selected = _selection(metafunc)
    drawn = itertools.islice((x for x in order if runs(x) and selected(x)), count)
    # Without any, pytest would make an item without parameters; the command line deselects these.
    kept = {id(call) for call in drawn} or {id(call) for call in order[:count]}
    calls[:] = [call for call in calls if id(call) in kept]


def _selection(metafunc: Any) -> Callable[[Any], bool]:
    """Whether -k and -m select the item that a parameter set will be."""
    definition, option = metafunc.definition, metafunc.config.option
    names = KeywordMatcher.from_item(definition)._names
    marks = list(definition.iter_markers())
    keywords, markers = (
        Expression.compile(text) if text.strip() else None
        for text in (option.keyword, option.markexpr)
    )

    def selected(call: Any) -> bool:
        own = {f"{definition.name}[{call.id}]", *(mark.name for mark in call.marks)}
        return (keywords is None or keywords.evaluate(KeywordMatcher(names | own))) and (
            markers is None or markers.evaluate(MarkMatcher.from_markers([*marks, *call.marks]))
        )

    return selected
