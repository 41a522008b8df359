"""The counts of instructions against a kernel written out by hand."""

from __future__ import annotations

from collections import Counter

from benchmarks.ops.instructions import count

# A guard, a loop with a branch to a block behind the end and back, a part that may be left out, padding.
TEXT = """
kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0020*/                   LDG.E.U16 R8, desc[UR8][R2.64] ;
        /*0030*/               @P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/               @P2 BRA `(.L_x_9) ;
.L_x_2:
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   REDUX.SUM.S32 UR4, R2 ;
        /*0080*/                   BRA P1, `(.L_x_1) ;
.L_x_3:
        /*0090*/              @!P6 BRA `(.L_x_4) ;
        /*00a0*/                   LDG.E R9, desc[UR8][R2.64] ;
        /*00b0*/                   SHFL.BFLY PT, R4, R5, 0x10, 0x1f ;
.L_x_4:
        /*00c0*/               @P3 EXIT ;
        /*00d0*/                   STG.E desc[UR8][R2.64], R9 ;
        /*00e0*/                   EXIT ;
.L_x_9:
        /*00f0*/                   FADD R1, R1, R1 ;
        /*0100*/                   BRA `(.L_x_2) ;
.L_x_10:
        /*0110*/                   BRA `(.L_x_10);
        /*0120*/                   NOP;
"""


def test_loops_branches_and_what_is_behind_the_end():
    counts = count(TEXT)
    assert [str(loop) for loop in counts.loops] == ["7 (1 b, 1 s)"]
    assert str(counts.straight) == "10 (0 b, 1 s)"
    # The shuffle with its load, and the store behind the first exit.
    assert counts.skippable == 4
    assert counts.loads == Counter({128: 1, 32: 1, 16: 1})


def test_one_block():
    counts = count("        /*0000*/                   EXIT ;")
    assert (counts.straight.instructions, counts.skippable, counts.loops) == (1, 0, [])
