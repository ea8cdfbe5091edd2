"""The latency model over machine code that is made up, whose cycles can be counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import latency_model
import sass

NAME = (
    "_ZN6mmixer4cuda5entryINS0_{direction}INS0_6LayoutILi128ELi4ELi8ELi1ELi3ELi{samples}E"
    "LNS0_5DtypeE2EEENS0_{path}EEEEEvNT_9ArgumentsE"
)


def line(
    address: int,
    text: str,
    stall: int = 1,
    writes: int = sass.NONE,
    reads: int = sass.NONE,
    waits: tuple[int, ...] = (),
) -> str:
    """An instruction as cuobjdump prints it."""
    mask = sum(1 << i for i in waits)
    control = stall | writes << 5 | reads << 8 | mask << 11
    return (
        f"        /*{address:04x}*/                   {text} ;   /* 0x0000000000000000 */\n"
        f"                                               /* 0x{control << 41:016x} */\n"
    )


def listing(*lines: str, direction: str = "7Forward", path: str = "11ClusterPath") -> str:
    name = NAME.format(direction=direction, path=path, samples=8)
    return f"\tcode for sm_90\n\t\tFunction : {name}\n" + "".join(lines)


LOOP = (
    line(0x00, "LEA R3, R1, R2, 0x18", stall=5),
    line(0x10, "VIADD R5, R3, 0x100", stall=5),
    line(0x20, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3+URZ+0x100], R6", stall=2, writes=0),
    line(0x30, "@!P0 BRA 0xc0", stall=5, waits=(0,)),
    line(0x40, "HMMA.16816.F32.BF16 R8, R20.reuse, R24, RZ", stall=6),
    line(0x50, "@!P2 BRA 0x80", stall=5),
    line(0x60, "MOV R7, 0x80", stall=1),
    line(0x70, "CALL.REL.NOINC 0xf0", stall=5),
    line(0x80, "FADD R8, R8, R9", stall=4),
    line(0x90, "STAS [R4.64], R8", stall=1, reads=1),
    line(0xA0, "@!P1 BRA 0x20", stall=5),
    line(0xB0, "EXIT", stall=5),
    line(0xC0, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3+URZ+0x100], R6", stall=2, writes=0),
    line(0xD0, "@!P0 BRA 0xc0", stall=5, waits=(0,)),
    line(0xE0, "BRA 0x40", stall=5),
    line(0xF0, "RET.REL.NODEC R6", stall=5),
)


def kernel(*lines: str, **name: str) -> sass.Kernel:
    (found,) = sass.kernels(listing(*lines, **name))
    return found


def test_instructions_are_decoded() -> None:
    found = kernel(
        line(0x40, "@!P3 LDS.128 R4, [R2+0x10]", stall=4, writes=2, reads=5, waits=(0, 3, 5)),
        line(0x50, "STG.E desc[UR4][R2.64], R4 &req={1} ?trans2", stall=15),
    )
    assert found.code[0] == sass.Instruction(
        0x40, "@!P3", "LDS.128", "R4, [R2+0x10]", stall=4, writes=2, reads=5, waits=(0, 3, 5)
    )
    assert found.code[1].operands == "desc[UR4][R2.64], R4"
    assert found.code[1].stall == 15
    assert found.code[0].is_a("LDS")
    assert not found.code[0].is_a("LD")


def test_a_kernels_name_tells_its_layout() -> None:
    found = kernel(*LOOP, direction="8Backward", path="8WidePath")
    assert (found.architecture, found.direction, found.path) == ("sm_90", "backward", "wide")
    assert (found.hidden, found.blocks, found.warps, found.parts) == (128, 4, 8, 1)
    assert (found.resident, found.samples, found.terms) == (3, 8, 2)
    assert (found.row_tiles, found.k_blocks) == (1, 1)


def test_the_loop_is_that_around_the_products_without_its_slow_path() -> None:
    loop = sass.loop_over_time(kernel(*LOOP))
    assert [i.address for i in loop] == [0x20, 0x30, 0x40, 0x50, 0x80, 0x90, 0xA0]


def test_code_without_a_loop_is_refused() -> None:
    straight = [text for text in LOOP if "BRA 0x20" not in text]
    with pytest.raises(ValueError, match="no loop around its products"):
        sass.loop_over_time(kernel(*straight))


def test_cycles_of_a_step() -> None:
    """The cycles of a step add up as they do by hand: from the end of the wait 5 for the branch, 33
    for the product until its sum is read, 4 for the sum; from the store 1, and 5 for the branch."""
    prediction = latency_model.predict(kernel(*LOOP))
    (wait,) = prediction.waits
    assert (wait.work, wait.hidden, wait.hop) == (5 + 33 + 4, 1 + 5, latency_model.HOP)
    assert prediction.work == wait.work
    assert prediction.instructions == 7
    cycles = wait.work + wait.hop + latency_model.LATENCIES["SYNCS"]
    assert set(prediction.cycles.values()) == {cycles}
    assert f"{cycles} cycles, 0.1" in latency_model.text(prediction)


def test_an_operand_takes_the_network_its_bytes() -> None:
    wide = [text.replace("STAS [", "STAS.128 [") for text in LOOP]
    prediction = latency_model.predict(kernel(*wide))
    for bytes_per_cycle, cycles in prediction.cycles.items():
        hop = latency_model.HOP + 2 * 8 * 128 // bytes_per_cycle
        assert cycles == prediction.work + hop + latency_model.LATENCIES["SYNCS"]


def test_work_behind_the_store_is_hidden() -> None:
    more = list(LOOP)
    more.insert(10, line(0x98, "SHFL.BFLY PT, R8, R8, 0x1, 0x1f", stall=2, writes=1))
    more.insert(11, line(0x9C, "FADD R8, R8, R8", stall=4, waits=(1,)))
    before, after = (latency_model.predict(kernel(*lines)) for lines in (LOOP, more))
    assert after.work == before.work
    assert after.waits[0].hidden == before.waits[0].hidden + latency_model.LATENCIES["SHFL"] + 4
    assert after.cycles == before.cycles


def test_a_store_to_a_barrier_that_nothing_waits_for_is_refused() -> None:
    wrong = [text.replace("VIADD R5, R3, 0x100", "VIADD R5, R3, 0x108") for text in LOOP]
    with pytest.raises(ValueError, match=r"sends on \['shared\+0x108'\] and waits on"):
        latency_model.predict(kernel(*wrong))


def test_packets_through_l2() -> None:
    """A poll costs the 270 cycles of its load, and its use; a store is seen 350 cycles later."""
    loop = (
        line(0x00, "LDG.E.64.STRONG.GPU R2, desc[UR4][R4.64]", stall=1, writes=0),
        line(0x10, "ISETP.NE.AND P0, PT, R3, R6, PT", stall=13, waits=(0,)),
        line(0x20, "@P0 BRA 0x0", stall=5),
        line(0x30, "BAR.SYNC.DEFER_BLOCKING 0x0", stall=6),
        line(0x40, "HMMA.16816.F32.BF16 R8, R20, R24, RZ", stall=6),
        line(0x50, "STG.E.64.STRONG.GPU desc[UR4][R4.64], R8", stall=2, reads=1),
        line(0x60, "@!P1 BRA 0x0", stall=5),
        line(0x70, "EXIT", stall=5),
    )
    prediction = latency_model.predict(kernel(*loop, path="15CooperativePath"))
    work = 13 + 5 + latency_model.LATENCIES["BAR"] + latency_model.LATENCIES["HMMA"]
    assert prediction.work == work
    expected = work + latency_model.L2_STORE + latency_model.L2_LOAD
    assert set(prediction.cycles.values()) == {expected}


def test_without_cuobjdump(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sass, "cuobjdump", lambda: None)
    monkeypatch.setattr(sys, "argv", ["latency_model.py", "some.cubin"])
    with pytest.raises(SystemExit):
        latency_model.main()
    assert "there is no cuobjdump: install CUDA's or triton" in capsys.readouterr().err
