"""`make cuda-check` finds an ordinary row's path, and what the loop over rows has."""

import pytest
from cuda_check import row_path
from cuda_check.row_path import Row

# Of nvcc 13.0 for compute capability 9.0, shortened: two classes a thread, in two blocks.
LOOP = """\
        /*0000*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0010*/               @P0 BRA 0x190 ;
        /*0020*/              @!P1 BRA 0x40 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR4][R8.64] ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/                   FFMA R4, R4, R6, R7 ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/               @P2 BRA 0xa0 ;
        /*0080*/                   MUFU.EX2 R10, R10 ;
        /*0090*/                   MUFU.EX2 R11, R11 ;
        /*00a0*/                   MUFU.EX2 R6, R6 ;
        /*00b0*/                   MUFU.EX2 R7, R7 ;
        /*00c0*/                   BRA.DIV UR4, 0x1e0 ;
        /*00d0*/                   SHFL.BFLY PT, R12, R4, 0x10, 0x1f ;
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00f0*/                   BRA P3, 0x160 ;
        /*0100*/              @!P4 BRA 0x190 ;
        /*0110*/                   FMUL R4, R4, R12 ;
        /*0120*/                   F2FP.BF16.F32.PACK_AB R4, R5, R4 ;
        /*0130*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0140*/                   BRA 0x190 ;
        /*0150*/                   NOP ;
        /*0160*/                   STG.E.128 desc[UR4][R2.64], RZ ;
        /*0170*/                   STG.E.128 desc[UR4][R2.64+0x10], RZ ;
        /*0180*/               @P5 BRA 0x160 ;
        /*0190*/               @P6 BRA 0x10 ;
        /*01a0*/                   MEMBAR.ALL.GPU ;
        /*01b0*/                   EXIT ;
        /*01c0*/                   BRA 0x1c0;
        /*01d0*/                   NOP ;
        /*01e0*/                   WARPSYNC.COLLECTIVE R15, 0x1f0 ;
        /*01f0*/                   SHFL.BFLY P6, R12, R4, 0x10, 0x1f ;
        /*0200*/                   BRA 0xe0 ;
"""
# From 0x10 to 0x70, 0xa0 to 0x140, and 0x190.
ORDINARY = Row(instructions=7 + 11 + 1, classes=2, accesses=2, barriers=1)


def test_the_path_of_an_ordinary_row():
    assert row_path.row(LOOP) == ORDINARY


def test_only_accesses_of_16_bytes_make_a_path_longer():
    narrow = LOOP.replace("LDGSTS.E.BYPASS.128", "LDGSTS.E")
    assert row_path.row(narrow) == ORDINARY._replace(
        instructions=ORDINARY.instructions - 1, accesses=1
    )


def test_accesses_in_a_loop_of_their_own_are_not_counted():
    rolled = LOOP.replace("BRA 0x190 ;\n        /*0150*/", "@P5 BRA 0x110 ;\n        /*0150*/")
    assert row_path.row(rolled).accesses == 1


def test_barriers_and_fences_of_the_loop():
    with_more = LOOP.replace("FFMA R4, R4, R6, R7", "MEMBAR.ALL.GPU").replace(
        "STG.E.128 desc[UR4][R2.64+0x10], RZ", "UCGABAR_WAIT"
    )
    assert row_path.row(with_more) == ORDINARY._replace(barriers=2, fences=1)


def test_a_loop_that_a_call_leaves():
    """As for compute capability 8.0."""
    left = LOOP.replace("@P6 BRA 0x10 ;", "@P6 CALL.REL.NOINC 0x1b0 ;").replace(
        "MEMBAR.ALL.GPU", "BRA 0x10"
    )
    assert row_path.row(left) == ORDINARY._replace(instructions=ORDINARY.instructions + 1)


def test_a_kernel_without_a_loop():
    once = LOOP.replace("@P6 BRA 0x10 ", "NOP ")
    # And the first instruction, the fence and the exit.
    assert row_path.row(once) == ORDINARY._replace(
        instructions=ORDINARY.instructions + 3, barriers=0
    )


@pytest.mark.parametrize(
    ("name", "another"), [("MUFU.EX2", "EX2"), ("@P6 BRA 0x10", "BRX R2 -0x1a0")]
)
def test_a_listing_of_another_form_is_an_error(name, another):
    with pytest.raises(ValueError, match="no path"):
        row_path.row(LOOP.replace(name, another))
