"""What a run leaves behind: the JSON file and the figures derived from it."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1


@dataclass(frozen=True)
class Outcome:
    """One contender on one workload. A wrong or failed one has no time.

    Errors are relative: of the loss, and of the gradient in the L2 norm, against float64. Host and
    graph are measured on a GPU only: until the host is free again, and without the host.
    """

    status: Literal["right", "wrong", "failed"]
    message: str = ""
    loss_error: float | None = None
    gradient_error: float | None = None
    seconds: float | None = None
    seconds_q25: float | None = None
    seconds_q75: float | None = None
    seconds_least: float | None = None
    repetitions: int = 0
    peak_extra_bytes: int | None = None
    host_seconds: float | None = None
    graph_seconds: float | None = None

    @property
    def spread(self) -> float | None:
        """The interquartile range over the median."""
        if self.seconds is None or self.seconds_q25 is None or self.seconds_q75 is None:
            return None
        return (self.seconds_q75 - self.seconds_q25) / self.seconds


@dataclass(frozen=True)
class Case:
    """One workload in one dtype."""

    family: str
    loss: str
    workload: str
    dtype: str
    student: list[list[int]]
    teacher: list[list[int]]
    headline: bool
    ideal_bytes: int
    gradient_bytes: int
    rounding_error: float
    outcomes: dict[str, Outcome]

    def seconds(self, contender: str) -> float | None:
        outcome = self.outcomes.get(contender)
        return outcome.seconds if outcome else None

    def speedup(self, contender: str, over: str) -> float | None:
        """How many times faster than another contender, by the medians."""
        own, other = self.seconds(contender), self.seconds(over)
        return other / own if own and other else None

    def graph_seconds(self, contender: str) -> float | None:
        outcome = self.outcomes.get(contender)
        return outcome.graph_seconds if outcome else None

    def graph_speedup(self, contender: str, over: str) -> float | None:
        """The same without the host."""
        own, other = self.graph_seconds(contender), self.graph_seconds(over)
        return other / own if own and other else None

    def bandwidth(self, contender: str) -> float | None:
        """Ideal bytes per second, without the host where that is known."""
        seconds = self.graph_seconds(contender) or self.seconds(contender)
        return self.ideal_bytes / seconds if seconds else None


@dataclass(frozen=True)
class Origin:
    """Of one run: what it was, on which machine."""

    schema: int
    device: str
    date: str
    commit: str
    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    complete: bool

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Record(Origin):
    """What the losses cost. `subject` is the best fastkd backend that was measured."""

    subject: str
    copy_bandwidth: dict[str, float]
    cases: list[Case]

    @classmethod
    def load(cls, path: Path) -> "Record":
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"{path} has schema {content['schema']}, expected {SCHEMA}")
        for case in content["cases"]:
            case["outcomes"] = {k: Outcome(**v) for k, v in case["outcomes"].items()}
        content["cases"] = [Case(**case) for case in content["cases"]]
        return cls(**content)

    def dtypes(self) -> list[str]:
        return list(dict.fromkeys(case.dtype for case in self.cases))

    def families(self) -> list[str]:
        return list(dict.fromkeys(case.family for case in self.cases))

    def subject_of(self, case: Case) -> str:
        """The backend that a case's ratios are about: not every loss has kernels everywhere."""
        return self.subject if self.subject in case.outcomes else "reference"

    def share(self, case: Case, contender: str) -> float | None:
        """Of the bandwidth of a large copy between tensors that are already mapped."""
        bandwidth = case.bandwidth(contender)
        return bandwidth / self.copy_bandwidth["warm"] if bandwidth else None

    def groups(self, dtype: str) -> Iterator[tuple[str, list[Case]]]:
        """The sets of cases to summarise: by family, by loss, and all."""
        cases = [case for case in self.cases if case.dtype == dtype]
        for family in self.families():
            yield family, [case for case in cases if case.family == family]
        for loss in dict.fromkeys(case.loss for case in self.cases):
            yield loss, [case for case in cases if case.loss == loss]
        yield "all", cases

    def speedups(self, cases: Iterable[Case], over: str) -> list[float]:
        found = (case.speedup(self.subject_of(case), over) for case in cases)
        return [ratio for ratio in found if ratio is not None]


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
