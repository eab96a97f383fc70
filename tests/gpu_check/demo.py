"""The demo in channels_last and bfloat16 autocast: kernels train as accurately as the reference.

python tests/gpu_check/demo.py DIR [--device cuda]
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "distill.py"
BACKENDS = ("native", "reference")
OPTIONS = ("--channels-last", "--amp", "--seeds", "4", "--epochs", "20")
# Differences of means of so few seeds; each mean is off by half of the spread.
SPREADS = 2.0


def train(out: Path, *options: str) -> list[dict]:
    """Side by side: the results of each backend."""
    commands = [
        [sys.executable, str(EXAMPLE), "--backend", name, "--output", str(out / name), *options]
        for name in BACKENDS
    ]
    running = [subprocess.Popen(command) for command in commands]
    if any([process.wait() for process in running]):
        raise SystemExit("the demo failed")
    return [json.loads((out / name / "results.json").read_text()) for name in BACKENDS]


def compare(found: dict, expected: dict) -> list[str]:
    """Each method that one backend trains better than the other, beyond what seeds explain."""
    pairs = list(zip(found["students"], expected["students"], strict=True))
    variances = [row["accuracy"]["std"] ** 2 for pair in pairs for row in pair]
    # Of all methods together: the spread of a few seeds alone says little.
    spread = statistics.mean(variances) ** 0.5
    print(f"spread of a method's seeds: {spread:.2f} points")
    problems = []
    for own, other in pairs:
        means = [row["accuracy"]["mean"] for row in (own, other)]
        line = "{}: {:.2f} % and {:.2f} %".format(own["name"], *means)
        print(line)
        if abs(means[0] - means[1]) > SPREADS * spread:
            problems.append(f"{line}, further apart than {SPREADS} spreads of {spread:.2f}")
    return problems


def main(out: str, *options: str) -> int:
    problems = compare(*train(Path(out), *OPTIONS, *(options or ("--device", "cuda"))))
    print("\n".join(problems) or f"{' and '.join(BACKENDS)} train to the same accuracy")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
