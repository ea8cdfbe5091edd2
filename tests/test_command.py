from __future__ import annotations

import os

import pytest

from mmixer_kernels import command
from mmixer_kernels.errors import DamagedFile, UserError


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("wrong"), 2, "error: wrong\n"),
        (DamagedFile("clip.avi", "is broken"), 2, "error: clip.avi: is broken\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        raise error

    assert command.run(body) == code
    assert capsys.readouterr().err == message
    assert command.run(lambda: 1) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_processors_are_those_that_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert command.processors() == 1
    finally:
        os.sched_setaffinity(0, before)
