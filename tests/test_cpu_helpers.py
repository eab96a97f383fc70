"""What brings the CPU kernels' vectors to and from memory, each helper of storage.h by itself.

For each instruction set, arithmetic and storage type, alignment and number of elements. A helper
touches its own elements alone: around them lie guard bytes, and what is read ends where an
allocation does, for AddressSanitizer to see.
"""

import importlib.util
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import DTYPES
from conftest import BACKENDS

from fastkd.kernels import compiled

pytestmark = pytest.mark.skipif("native" not in BACKENDS, reason="native is not under test")

BUILD = Path(__file__).parent.parent / "build" / "cpu_helpers"
BUILT = Path(
    os.environ.get("FASTKD_CPU_HELPERS_PATH")
    or next(BUILD.glob("_cpu_helpers*.so"), BUILD / "_cpu_helpers*.so")
).resolve()
# As csrc/tensor.h numbers them.
IN_CSRC = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
GUARD = 128  # bytes, more than the widest vector has
# Per dtype: the digits of its significand, the exponent of its least normal number, its largest.
FORMATS = {
    torch.float32: (24, -126, 2.0**128),
    torch.float16: (11, -14, 2.0**16),
    torch.bfloat16: (8, -126, 2.0**128),
}


@pytest.fixture(scope="module")
def helpers():
    if not BUILT.exists():
        pytest.fail(f"{BUILT} is missing: `make cpu-helpers` builds it", pytrace=False)
    spec = importlib.util.spec_from_file_location("_cpu_helpers", BUILT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def instruction_sets():
    module = compiled.load()
    return module.isas() if not isinstance(module, str) else ["avx512"]


@pytest.fixture(params=instruction_sets())
def isa(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["in_float", "in_double"])
def arithmetic(request):
    return request.param


@pytest.fixture(params=DTYPES)
def storage(request):
    return request.param


def numbers(count, dtype):
    """Of all sizes that float16 tells apart; ties and what is not finite are among them."""
    x = torch.randn(count, dtype=torch.float64) * 2.0 ** torch.randint(-20, 20, (count,))
    ties = torch.rand(count) < 0.2
    x[ties] = x[ties].to(torch.float16).double() * (1 + 2.0**-11)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.99, 65520, 6e-8])
    chosen = torch.rand(count) < 0.2
    x[chosen] = special[torch.randint(len(special), (int(chosen.sum()),))].double()
    return x.to(dtype).double()


def rounded(x, dtype):
    """float64 numbers as the nearest of a dtype, ties to even; torch may round twice."""
    if dtype == torch.float64:
        return x
    digits, least, largest = FORMATS[dtype]
    x = x.numpy()
    with np.errstate(invalid="ignore"):
        _, exponent = np.frexp(np.where(np.isfinite(x), x, 1))
        step = np.exp2(np.maximum(exponent - 1, least) - (digits - 1.0))
        out = np.where(np.isfinite(x), np.rint(x / step) * step, x)
    return torch.from_numpy(np.where(abs(out) >= largest, np.copysign(np.inf, x), out))


def same(a, b):
    return np.array_equal(a.numpy(), b.numpy(), equal_nan=True)


class Case:
    """One instruction set, arithmetic and storage type."""

    def __init__(self, helpers, isa, arithmetic, storage):
        self.helpers, self.isa, self.storage = helpers, isa, storage
        self.arithmetic, self.in_double = arithmetic, arithmetic == torch.float64
        self.width = helpers.width(isa, self.in_double)
        self.streamed = helpers.streamed_bytes(isa, self.in_double, self.dtype)
        self.drawn = {dtype: numbers(4000, dtype) for dtype in dict.fromkeys((arithmetic, storage))}
        self.noise = torch.randint(256, (4 * GUARD + 8 * 256,), dtype=torch.uint8)

    def numbers(self, count, dtype):
        """Some of those drawn."""
        start = random.randrange(len(self.drawn[dtype]) - count)
        return self.drawn[dtype][start : start + count]

    @property
    def dtype(self):
        return IN_CSRC.index(self.storage)

    def call(self, name, memory, at, values, n, stride=1, non_temporal=False, fill=0.0):
        helper = getattr(self.helpers.Helper, name)
        return self.helpers.call(
            self.isa, helper, self.in_double, self.dtype, memory, at, values, n, stride,
            non_temporal, fill,
        )  # fmt: skip

    def alignments(self):
        """In bytes, of every element of a line of the cache."""
        return range(0, 64, self.storage.itemsize)

    def check_load(self, name, at, n, stride=1):
        """`n` elements as lanes, and the fill or nothing in the others."""
        stored = self.numbers((n - 1) * stride + 1 if n else 0, self.storage)
        memory = bytes(at) + stored.to(self.storage).view(torch.uint8).numpy().tobytes()
        count = n if name == "gather" else self.width
        lanes = np.full(count, 7.0)
        after, values = self.call(name, memory, at, lanes, n, stride, fill=-3.0)
        expected = torch.full((count,), -3.0, dtype=torch.float64)
        expected[:n] = stored[::stride].to(self.arithmetic).double()
        assert after == memory
        assert same(torch.from_numpy(values), expected), (at, n, stride)

    def check_store(self, name, at, n, stride=1, non_temporal=False):
        """`n` elements, and guard bytes before, between and after them."""
        count = max(n, self.width) if name in ("store_part", "store_lanes") else n
        values = self.numbers(count, self.arithmetic)
        size, at = self.storage.itemsize, at + GUARD
        length = at + ((n - 1) * stride + 1 if n else 0) * size + GUARD
        memory = self.noise[:length]
        assert len(memory) == length
        after, _ = self.call(
            name, memory.numpy().tobytes(), at, values.numpy(), n, stride, non_temporal
        )
        after = torch.frombuffer(bytearray(after), dtype=torch.uint8)
        index = at + torch.arange(n)[:, None] * stride * size + torch.arange(size)
        written = after[index.flatten()].view(self.storage).double() if n else torch.empty(0)
        assert same(written, rounded(values[:n], self.storage)), (at, n, stride, non_temporal)
        after[index.flatten()] = memory[index.flatten()]
        assert torch.equal(after, memory), (at, n, stride, non_temporal)


@pytest.fixture
def case(helpers, isa, arithmetic, storage):
    return Case(helpers, isa, arithmetic, storage)


def test_whole_vectors_are_loaded(case):
    for at in case.alignments():
        case.check_load("load_as", at, case.width)
        case.check_load("load_lanes", at, case.width)
        if case.storage.itemsize in (2, case.arithmetic.itemsize):
            case.check_load("load", at, case.width)


def test_parts_of_vectors_are_loaded(case):
    for at in case.alignments():
        for n in range(case.width + 1):
            case.check_load("load_part", at, n)
        for n in range(case.width):
            case.check_load("load_lanes", at, n)


def test_whole_vectors_are_stored(case):
    for at in case.alignments():
        case.check_store("store", at, case.width)
        case.check_store("store_lanes", at, case.width)


def test_parts_of_vectors_are_stored(case):
    for at in case.alignments():
        for n in range(case.width + 1):
            case.check_store("store_part", at, n)
        for n in range(case.width):
            case.check_store("store_lanes", at, n)


def test_vectors_are_streamed_where_they_may_be(case):
    """Each pair of types is streamed by as many bytes as its vector takes, or stored."""
    size = case.width * case.storage.itemsize
    exists = {"avx512": (16, 32, 64), "avx2": (16, 32)}.get(case.isa, ())
    assert case.streamed == (size if size in exists else 0)
    for at in range(0, 64, case.streamed or case.storage.itemsize):
        for _ in range(8):
            case.check_store("stream", at, case.width)


def test_elements_until_a_vector_may_be_streamed(case):
    for address in range(4096, 4096 + 256, case.storage.itemsize):
        for n in (0, 1, 3, case.width, 1000):
            past = address % case.streamed if case.streamed else 0
            expected = min(n, (case.streamed - past) // case.storage.itemsize if past else 0)
            actual = case.helpers.until_aligned(case.isa, case.in_double, case.dtype, address, n)
            assert actual == expected


@pytest.mark.parametrize("non_temporal", [False, True])
def test_any_number_of_elements_is_written(case, non_temporal):
    for at in case.alignments():
        for n in [*range(3 * case.width + 2), 5 * case.width - 1]:
            case.check_store("write_vectors", at, n, non_temporal=non_temporal)


def test_stretches_are_gathered(case):
    for at in case.alignments():
        for n in [*range(case.width + 2), 2 * case.width + 1]:
            for stride in (1, 2, 5):
                case.check_load("gather", at, n, stride)


@pytest.mark.parametrize("non_temporal", [False, True])
def test_stretches_are_scattered(case, non_temporal):
    for at in case.alignments():
        for n in [*range(case.width + 2), 3 * case.width + 1]:
            for stride in (1, 2, 5):
                case.check_store("scatter", at, n, stride, non_temporal)
