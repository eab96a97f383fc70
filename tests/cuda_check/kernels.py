"""What is demanded of each CUDA kernel, and what is wrong with one."""

from typing import NamedTuple

from .row_path import Row


class Demand(NamedTuple):
    """Of the kernels whose names begin so."""

    name: str
    shared: str = ""  # the struct in fastkd::cuda that is the kernel's dynamic shared memory
    # How often, at least, 16 bytes are read and written at a time.
    loads: int = 0
    stores: int = 0
    since: int = 0  # the architecture; before it the kernel is empty
    bulk_copies: int = 0  # on the architectures that have them
    most_instructions: int | None = None
    most_registers: int | None = None
    # Of a row's path at most so many instructions, and so many more for each class of a thread.
    most_of_row: int | None = None
    most_of_class: float = 0
    accesses: int = 0  # of 16 bytes on that path, at least, and in no loop of their own
    barriers: int | None = None  # at most, in the loop over rows


# Each of a thread's vectors, three or more, has accesses of its own. Code that is added must leave
# all of it in the cache of instructions. Registers are those of 512 threads on a multiprocessor.
LONG_ROWS = {"loads": 6, "stores": 3, "accesses": 9, "most_registers": 128, "most_of_row": 210}
OF_16_BITS = {**LONG_ROWS, "most_instructions": 9000, "most_of_class": 20.5}
OF_FLOAT32 = {**LONG_ROWS, "most_instructions": 9000, "most_of_class": 22}
# They choose among dtypes in each vector.
OF_TWO_DTYPES = {**LONG_ROWS, "most_instructions": 10000, "most_of_class": 26.5}
# A cluster's blocks meet once in a row. A single block meets once more, for the sums of its warps.
CLUSTER, BLOCK = {"barriers": 1, "since": 90}, {"barriers": 2}

# One tensor's vectors are fetched at a time. Each class of the student has a logarithm.
TEACHERS = {"loads": 20, "stores": 9, "most_registers": 128, "most_instructions": 11500}

# The first line that fits a kernel counts. A kernel without a line fails the check, and so does a
# line without a kernel.
DEMANDS = {
    # Four accesses in flight, of float32 and of 16-bit features, by planes and by rows, to maps and
    # to gradients. Those of max_pow are written alone. Dense rows are copied in bulk.
    "attention": [
        Demand("attention_forward_kernel<double", shared="Shared"),
        Demand("attention_forward_kernel<float", shared="Shared", loads=16, bulk_copies=2),
    ],
    "attention_backward": [
        Demand("attention_backward_kernel<double"),
        Demand("attention_backward_kernel<float, LargestOf", stores=16),
        Demand("attention_backward_kernel<float", loads=16, stores=16),
    ],
    "hint": [
        # Scattered elements, and arithmetic in float64.
        Demand("hint_kernel<Any", shared="Shared"),
        # Student, teacher and gradient; where dtypes differ, one takes two accesses for the
        # other's one. Three or more of each are in flight.
        Demand("hint_kernel<", shared="Shared", loads=9, stores=3),
        Demand("hint_rows_kernel<"),
    ],
    # Both passes read both sides, and each row has numbers of its own.
    "metrics": [
        Demand("metrics_kernel<double"),
        Demand("metrics_kernel<float, Any", loads=4),
        Demand("metrics_kernel<float", loads=4),
    ],
    "soft_target": [Demand("count_kernel")],
    # Rows are fetched in a loop of one access for each side, and gradients written from registers.
    "soft_target_short_rows": [
        Demand(
            "soft_target_short_rows_kernel<",
            loads=2,
            stores=1,
            most_of_row=250,
            most_of_class=23.5,
            barriers=0,
        )
    ],
    "soft_target_long_rows": [
        Demand("soft_target_long_rows_kernel<ForwardKl, true, Any", **OF_TWO_DTYPES, **CLUSTER),
        Demand("soft_target_long_rows_kernel<ForwardKl, false, Any", **OF_TWO_DTYPES, **BLOCK),
        Demand("soft_target_long_rows_kernel<ForwardKl, true, float", **OF_FLOAT32, **CLUSTER),
        Demand("soft_target_long_rows_kernel<ForwardKl, false, float", **OF_FLOAT32, **BLOCK),
        Demand("soft_target_long_rows_kernel<ForwardKl, true", **OF_16_BITS, **CLUSTER),
        Demand("soft_target_long_rows_kernel<ForwardKl, false", **OF_16_BITS, **BLOCK),
    ],
    # Each side's vector, and one of the gradient or of zeros. The path leads through all of it.
    "soft_target_few": [
        Demand("soft_target_few_kernel<", loads=2, stores=2, most_of_row=420, most_of_class=22.5)
    ],
    "soft_target_stream": [
        Demand("soft_target_stream_kernel<ForwardKl, double"),
        Demand("soft_target_stream_kernel<", loads=4, stores=1),
    ],
    # A warp's accesses lie side by side, and a thread's are of one element.
    "soft_target_columns": [Demand("soft_target_columns_kernel<")],
    # Of every dtype that a vector may have, and for zeros.
    "soft_target_passes": [
        Demand("soft_target_passes_kernel<ForwardKl, double"),
        Demand("soft_target_passes_kernel<", loads=16, stores=8),
    ],
    # Each of three passes reads both sides, of every dtype, and the last one may write gradients of
    # both.
    "soft_target_general": [
        Demand("soft_target_general_kernel<double"),
        Demand("soft_target_general_kernel<", loads=32, stores=16, most_registers=128),
    ],
    # Two passes over the student, of every dtype; slots are read one by one.
    "top_k": [
        Demand("top_k_kernel<double"),
        Demand("top_k_kernel<", loads=8, stores=4, most_registers=128),
    ],
    "top_k_sums": [
        Demand("top_k_sums_kernel<double"),
        Demand("top_k_sums_kernel<", loads=4, most_registers=64),
    ],
    "soft_target_teachers_short_rows": [
        Demand("soft_target_teachers_short_rows_kernel<", loads=12, stores=12)
    ],
    "soft_target_teachers_long_rows": [
        Demand("soft_target_teachers_long_rows_kernel<ForwardKl, true", **TEACHERS, since=90),
        Demand("soft_target_teachers_long_rows_kernel<ForwardKl, false", **TEACHERS),
    ],
    "soft_target_backward": [
        Demand("soft_target_backward_rows_kernel<ForwardKl, double"),
        Demand("soft_target_backward_rows_kernel<", loads=2, stores=2),
        Demand("soft_target_backward_columns_kernel<"),
    ],
    # A warp's accesses lie side by side, and cost little beside what is computed.
    "rkd": [
        Demand("squared_distances_kernel<"),
        Demand("rkd_totals_kernel", shared="SumsOfTotals"),
        Demand("rkd_distance_kernel", shared="SumsOfLoss"),
        Demand("rkd_slopes_kernel"),
    ],
    "rkd_angle": [
        Demand("rkd_angle_kernel<1", shared="SharedOfPair"),
        Demand("rkd_angle_kernel<2", shared="SharedOfPairs"),
    ],
    "similarity": [
        Demand("similarity_rows_kernel<", shared="Shared"),
        Demand("similarity_slopes_kernel<", shared="Transposed"),
    ],
    "multiply": [Demand("multiply_kernel<", loads=4, stores=4)],
    "problem": [Demand("any_kernel")],
}


class Kernel(NamedTuple):
    name: str
    architecture: int
    threads: int  # of a block, at most
    registers: int  # of a thread
    shared_bytes: int  # of a block, static and dynamic
    stack: int  # bytes of local memory of a thread
    spills: int  # bytes, of which so many are stored and loaded again
    loads: int  # of 16 bytes at a time
    stores: int
    fences: int = 0  # sequentially consistent ones, which wait for all of the thread's memory
    tickets: int = 0  # atomics that find the last block,
    acquires: int = 0  # and what lets such a block see what the others wrote
    bulk_copies: int = 0
    instructions: int = 0
    row: Row | None = None  # where the demand has bounds for one


FIRST_WITH_BULK_COPIES = 90


class Chip(NamedTuple):
    """What one multiprocessor can hold."""

    warps: int
    blocks: int
    shared_kib: int


CHIPS = {
    80: Chip(64, 32, 164),
    86: Chip(48, 16, 100),
    89: Chip(48, 24, 100),
    90: Chip(64, 32, 228),
    100: Chip(64, 32, 228),
    120: Chip(48, 24, 100),
}


def occupancy(kernel: Kernel) -> float:
    """The share of a chip's warps that can be resident."""
    chip = CHIPS[kernel.architecture]
    warps = _up(kernel.threads, 32) // 32
    # Each quarter of a multiprocessor has 16,384 registers for warps of its own.
    by_registers = 4 * (16384 // _up(kernel.registers * 32, 256)) // warps
    # The system takes 1 KiB of each block's shared memory.
    by_shared = chip.shared_kib * 1024 // (_up(kernel.shared_bytes, 128) + 1024)
    return min(chip.warps // warps, chip.blocks, by_registers, by_shared) * warps / chip.warps


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def demand_of(source: str, kernel: str) -> Demand | None:
    matching = (d for d in DEMANDS.get(source, []) if kernel.startswith(d.name))
    return next(matching, None)


def problems(source: str, kernels: list[Kernel]) -> list[str]:
    """What is wrong with the kernels of a source, on one architecture."""
    found = []
    met = set()
    for kernel in kernels:
        found += memory_problems(kernel.name, kernel.stack, kernel.spills)
        if kernel.fences:
            found.append(f"{kernel.name}: {kernel.fences} sequentially consistent fences")
        if kernel.acquires < kernel.tickets:
            found.append(f"{kernel.name}: the last block does not acquire what others wrote")
        demand = demand_of(source, kernel.name)
        if demand is None:
            found.append(f"{kernel.name}: tests/cuda_check/kernels.py does not speak of it")
            continue
        met.add(demand)
        if kernel.architecture < demand.since:
            continue
        found += [f"{kernel.name}: {problem}" for problem in excesses(kernel, demand)]
        bulk_copies = demand.bulk_copies if kernel.architecture >= FIRST_WITH_BULK_COPIES else 0
        for what, there_are, least in (
            ("loads of 16 bytes", kernel.loads, demand.loads),
            ("stores of 16 bytes", kernel.stores, demand.stores),
            ("bulk copies", kernel.bulk_copies, bulk_copies),
            (
                "accesses of 16 bytes a row",
                kernel.row.accesses if kernel.row else 0,
                demand.accesses,
            ),
        ):
            if there_are < least:
                found.append(f"{kernel.name}: {there_are} {what}, not {least}")
    absent = [demand.name for demand in DEMANDS.get(source, []) if demand not in met]
    return found + [f"{name}: not in {source}.cu" for name in absent]


def excesses(kernel: Kernel, demand: Demand) -> list[str]:
    """Of what a kernel has more than is demanded."""
    counted = [
        ("instructions", kernel.instructions, demand.most_instructions),
        ("registers", kernel.registers, demand.most_registers),
    ]
    row = kernel.row
    if row is not None and demand.most_of_row is not None:
        most = demand.most_of_row + int(demand.most_of_class * row.classes)
        counted += [
            (f"instructions a row for {row.classes} classes a thread", row.instructions, most),
            ("barriers in the loop over rows", row.barriers, demand.barriers),
            ("fences in the loop over rows", row.fences, 0),
        ]
    return [
        f"{there_are} {what}, not {most} at most"
        for what, there_are, most in counted
        if most is not None and there_are > most
    ]


def memory_problems(kernel: str, stack: int, spills: int) -> list[str]:
    found = []
    if stack:
        found.append(f"{kernel}: a stack frame of {stack} bytes")
    if spills:
        found.append(f"{kernel}: spills ({spills})")
    return found
