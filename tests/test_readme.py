"""The examples of the documents run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "docs/usage.md", "docs/migration.md"]
EXAMPLES = [
    pytest.param(name, code, id=f"{name}-{number}")
    for name in DOCUMENTS
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL), 1
    )
    # These need other libraries: test_peers_integrations_examples.py runs them.
    if "fastkd.integrations" not in code
]


@pytest.mark.parametrize(("name", "code"), EXAMPLES)
def test_example(name, code):
    exec(compile(code, name, "exec"), {})


MIGRATION = (ROOT / "docs/migration.md").read_text()
CHANGES = re.findall(r"```diff\n(.*?)```", MIGRATION, re.DOTALL)
IMPORTS = [
    line
    for change in CHANGES
    for line in re.findall(r"^\+((?:from|import) .*)$", change, re.MULTILINE)
]


@pytest.mark.parametrize("line", IMPORTS)
def test_import_that_a_program_changes_to(line):
    exec(line, {})


def test_there_is_one_for_each_job():
    assert len(EXAMPLES) >= 10


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#([^)\s]*))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings
            ]
