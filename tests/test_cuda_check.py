"""`make cuda-check` sees what it is there to see: shown on recorded listings of the CUDA tools."""

import pytest
from cuda_check import kernels, listings
from cuda_check.kernels import Demand, Kernel, occupancy, problems
from cuda_check.row_path import Row

# Of nvcc 13.0: a kernel as it should be, one with an array in local memory, and one that was given
# too few registers and calls a function.
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_90'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 12.589 ms
ptxas info    : Compiling entry function '_Z5arrayPfi' for 'sm_90'
ptxas info    : Function properties for _Z5arrayPfi
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 256 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90'
ptxas info    : Function properties for _Z5spillPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z6calledPf
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 24 bytes cumulative stack size
"""

ELF = """\
 index           value           size      info    other  shndx    name
 0x7               0            0x84      0x1        0   0x12     fastkd_size_of_Shared
 0x8               0               0      0x3        0    0xe     .nv.constant4

.nv.info
\t<0x1>
\tAttribute:\tEIATTR_REGCOUNT
\tFormat:\tEIFMT_SVAL
\tValue:\tfunction: _Z4goodPf(0x9)\tregister count: 16

.nv.info._Z4goodPf
\t<0x9>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x100 0x1 0x1\x20

.nv.info._Z5arrayPfi
\t<0x1>
\tAttribute:\tEIATTR_CUDA_API_VERSION
\tFormat:\tEIFMT_SVAL
\tValue:\t0x82\x20
"""

SASS = """\
\t\tFunction : _Z4goodPf
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR4][R8.64] ;
        /*00a0*/                   LDG.E.ENL2.256 R16, R8, desc[UR4][R2.64] ;
        /*00b0*/                   STG.E.128 desc[UR4][R6.64], R4 ;
        /*00c0*/                   UBLKCP.S.G [UR14], [UR12], UR6, desc[UR4] ;
\t\tFunction : _Z6narrowPf
        /*0080*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0090*/                   LDS.128 R8, [R2] ;
        /*00a0*/                   STG.E desc[UR4][R6.64], R4 ;
        /*00b0*/                   STS.128 [R6], R4 ;
        /*00c0*/                   MEMBAR.SC.GPU ;
        /*00d0*/                   MEMBAR.ALL.GPU ;
        /*00e0*/                   ATOMG.E.INC.STRONG.GPU PT, R4, desc[UR4][R2.64], R5 ;
        /*00f0*/                   ATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R2.64], R5 ;
        /*0100*/                   CCTL.IVALL ;
"""


def kernel(name="row<float>", **changes):
    usual = Kernel(name, 90, 256, 32, 0, stack=0, spills=0, loads=4, stores=2, row=Row(182, 8, 3))
    return usual._replace(**changes)


@pytest.fixture(autouse=True)
def demands(monkeypatch):
    most = dict(most_instructions=500, most_registers=64, most_of_row=100, most_of_class=10.25)
    lines = [
        Demand("row<double"),
        Demand("row<", loads=4, stores=2, accesses=3, **most, barriers=1),
    ]
    monkeypatch.setattr(kernels, "DEMANDS", {"loss": lines})


def test_usage():
    usage = listings.usage(PTXAS)
    assert usage["_Z4goodPf"] == dict(registers=16, shared_bytes=1024, stack=0, spills=0)
    assert usage["_Z5arrayPfi"] == dict(registers=32, shared_bytes=0, stack=256, spills=0)
    assert usage["_Z5spillPf"] == dict(registers=255, shared_bytes=0, stack=24, spills=48)


def test_a_listing_of_another_form_is_an_error():
    with pytest.raises(ValueError, match="does not tell"):
        listings.usage(PTXAS.replace("spill stores", "spilled"))


def test_threads():
    assert listings.threads(ELF) == {"_Z4goodPf": 256}


def test_sizes():
    assert listings.sizes(ELF, "fastkd_size_of_") == {"Shared": 0x84}


GOOD, NARROW = listings.functions(SASS).values()


def test_functions():
    assert list(listings.functions(SASS)) == ["_Z4goodPf", "_Z6narrowPf"]


def test_accesses():
    assert listings.accesses(GOOD) == dict(loads=4, stores=1, bulk_copies=1)
    assert listings.accesses(NARROW) == dict(loads=0, stores=0, bulk_copies=0)


def test_ordering():
    assert listings.ordering(GOOD) == dict(fences=0, tickets=0, acquires=0)
    assert listings.ordering(NARROW) == dict(fences=1, tickets=1, acquires=1)


def test_length():
    assert listings.length(GOOD) == 5


DOUBLE = kernel("row<double>", loads=0, stores=0)


def test_a_good_kernel_has_no_problem():
    assert problems("loss", [kernel(), DOUBLE]) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stack": 16}, "row<float>: a stack frame of 16 bytes"),
        ({"spills": 8}, "row<float>: spills (8)"),
        ({"loads": 3}, "row<float>: 3 loads of 16 bytes, not 4"),
        ({"stores": 0}, "row<float>: 0 stores of 16 bytes, not 2"),
        ({"fences": 2}, "row<float>: 2 sequentially consistent fences"),
        (
            {"tickets": 2, "acquires": 1},
            "row<float>: the last block does not acquire what others wrote",
        ),
        ({"instructions": 501}, "row<float>: 501 instructions, not 500 at most"),
        ({"registers": 65}, "row<float>: 65 registers, not 64 at most"),
        (
            {"row": Row(instructions=183, classes=8, accesses=3)},
            "row<float>: 183 instructions a row for 8 classes a thread, not 182 at most",
        ),
        (
            {"row": Row(182, 8, accesses=2)},
            "row<float>: 2 accesses of 16 bytes a row, not 3",
        ),
        (
            {"row": Row(182, 8, 3, barriers=2)},
            "row<float>: 2 barriers in the loop over rows, not 1 at most",
        ),
        (
            {"row": Row(182, 8, 3, barriers=1, fences=1)},
            "row<float>: 1 fences in the loop over rows, not 0 at most",
        ),
    ],
)
def test_problems(changes, problem):
    assert problems("loss", [kernel(**changes), DOUBLE]) == [problem]


def test_each_kernel_has_its_demand_and_each_demand_its_kernel():
    (unknown,) = problems("loss", [kernel(), DOUBLE, kernel("column<float>")])
    assert unknown.startswith("column<float>: ")
    assert problems("loss", [kernel()]) == ["row<double: not in loss.cu"]
    assert len(problems("another", [kernel()])) == 1


def test_a_kernel_may_be_empty_before_an_architecture(monkeypatch):
    lines = [Demand("row<", loads=4, since=90)]
    monkeypatch.setattr(kernels, "DEMANDS", {"loss": lines})
    assert problems("loss", [kernel(architecture=89, loads=0)]) == []
    assert problems("loss", [kernel(architecture=90, loads=0)]) != []


# As cuda_occupancy.h of CUDA 13.0 has it; in the order: nothing, registers, shared memory, blocks.
@pytest.mark.parametrize(
    ("changes", "warps"),
    [
        ({"architecture": 90, "threads": 256, "registers": 32}, 64),
        ({"architecture": 90, "threads": 512, "registers": 33}, 48),
        ({"architecture": 86, "threads": 256, "registers": 32, "shared_bytes": 33864}, 16),
        ({"architecture": 86, "threads": 32, "registers": 16}, 16),
    ],
)
def test_occupancy(changes, warps):
    most = kernels.CHIPS[changes["architecture"]].warps
    assert occupancy(kernel(**changes)) == warps / most


def test_only_architectures_with_bulk_copies_need_them(monkeypatch):
    monkeypatch.setattr(kernels, "DEMANDS", {"loss": [Demand("row<", bulk_copies=2)]})
    assert problems("loss", [kernel(architecture=80)]) == []
    assert problems("loss", [kernel(bulk_copies=2)]) == []
    assert problems("loss", [kernel(bulk_copies=1)]) == ["row<float>: 1 bulk copies, not 2"]
