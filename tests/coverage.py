"""What tests reached of the CPU kernels, by gcov's count; fails at other places, but for a reason.

    python tests/coverage.py build/coverage

Lines and branches are those of the source: one that any instruction set, any type of a template
and any inlined copy has taken is reached. Left out are branches that the compiler made: those for
exceptions, and those of lines that have no condition. tests/unreached.txt says of each other place
why no test reaches it.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
REASONS = ROOT / "tests" / "unreached.txt"
MEASURED = "csrc/cpu/"
CONDITION = re.compile(r"\b(if|for|while|switch)\b|\?|&&|\|\|")


def counted(build):
    """gcovr's report of a build folder, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        subprocess.run(
            [
                sys.executable, "-m", "gcovr", "--root", str(ROOT), "--filter", MEASURED,
                "--exclude-throw-branches", "--exclude-unreachable-branches",
                "--json", str(report), str(build),
            ],
            check=True,
        )  # fmt: skip
        return json.loads(report.read_text())


def merged(lines):
    """By line: how often it ran, and how often each of its branches was taken.

    The instantiations of a template may differ in how many branches a line has: gcov knows of fewer
    exceptions where one never ran, and conditions on types are none. Those of one number are
    merged. A line is what the best of them is, but for single branches, which are no choice.
    """
    runs, numbers = collections.Counter(), {}
    for line in lines:
        number, taken = line["line_number"], [b["count"] for b in line["branches"]]
        runs[number] += line["count"]
        if len(taken) > 1 and line["count"]:
            merged = numbers.setdefault(number, {}).setdefault(len(taken), [0] * len(taken))
            merged[:] = [a + b for a, b in zip(merged, taken, strict=True)]
    branches = {n: min(of.values(), key=lambda taken: taken.count(0)) for n, of in numbers.items()}
    return runs, branches


def reasons():
    """`{(file, line of source): why}`."""
    found = {}
    for entry in REASONS.read_text().split("\n\n"):
        lines = [line for line in entry.splitlines() if line and not line.startswith("#")]
        if lines:
            place, source, *why = lines
            found[place, source.strip()] = " ".join(map(str.strip, why))
    return found


def main(build):
    known = reasons()
    used, unexplained, totals = set(), [], collections.Counter()
    for file in counted(build)["files"]:
        source = (ROOT / file["file"]).read_text().splitlines()
        runs, branches = merged(file["lines"])
        missed = {number: "line" for number, count in runs.items() if not count}
        for number, taken in sorted(branches.items()):
            if not CONDITION.search(source[number - 1]):
                continue
            totals["branches"] += len(taken)
            totals["branches reached"] += sum(count > 0 for count in taken)
            if not all(taken):
                missed[number] = f"branches {[i for i, n in enumerate(taken) if not n]}"
        totals["lines"] += len(runs)
        totals["lines reached"] += sum(count > 0 for count in runs.values())
        for number, what in sorted(missed.items()):
            place = file["file"], source[number - 1].strip()
            if place in known:
                used.add(place)
            else:
                unexplained.append(f"{file['file']}:{number}: {what} not reached: {place[1]}")
    for kind in ("lines", "branches"):
        print(f"{totals[kind + ' reached']} of {totals[kind]} {kind} of {MEASURED} are reached")
    for place in known.keys() - used:
        unexplained.append(f"{REASONS.name}: {place[0]}: is reached, or is no more: {place[1]}")
    print(f"{len(used)} places are not, for reasons in {REASONS.relative_to(ROOT)}")
    for place in unexplained:
        print(place)
    return len(unexplained) > 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
