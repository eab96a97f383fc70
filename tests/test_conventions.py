"""Every row of the tables of conventions in docs/numerics.md has its test."""

import re
from pathlib import Path

import test_conventions_divergences
import test_conventions_features
import test_conventions_logits
import test_conventions_probabilities
import test_conventions_relations
import test_conventions_temperatures
import test_conventions_top_k

DOCUMENT = Path(__file__).parent.parent / "docs" / "numerics.md"
MODULES = (
    test_conventions_divergences,
    test_conventions_features,
    test_conventions_logits,
    test_conventions_probabilities,
    test_conventions_relations,
    test_conventions_temperatures,
    test_conventions_top_k,
)


def rows():
    """`(table, first cell)` of each row, as the document has them."""
    text = DOCUMENT.read_text().partition("## Conventions of other libraries\n")[2]
    found = []
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("| ")]
        # A bar inside code is escaped and parts no cells.
        cells = [re.split(r"(?<!\\)\|", line)[1].strip() for line in lines]
        found += [(title, cell.replace("\\|", "|")) for cell in cells[1:]]
    return found


def test_every_row_has_its_test():
    tests = [
        value.convention
        for module in MODULES
        for value in vars(module).values()
        if hasattr(value, "convention")
    ]
    assert len(rows()) > 30
    assert sorted(tests) == sorted(rows())
