"""`python -m mmixer_kernels.train`, or `torchrun ... -m mmixer_kernels.train` for several
processes: trains an M-Mixer and tests it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import command
from .stop import Interrupted
from .training import distributed, parsing, result, run

PROG = "python -m mmixer_kernels.train"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    return command.run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    with distributed.silence_other_ranks():
        chosen = parsing.parse(arguments, PROG)
        if chosen.run.check is not None:
            found = run.check(chosen)
            print(found)
            return 1 if found.wrong else 0
    output = chosen.output
    try:
        report = run.train(chosen)
    except Interrupted as interruption:
        again = f"{PROG} --output {output} --resume"
        if distributed.is_first():
            print(f"stopped by {interruption}; go on with: {again}", file=sys.stderr)
        return 128 + interruption.number
    if distributed.is_first():
        print(result.describe(report, "test"))
        print(f"tested {report['checkpoint']}, epoch {report['epoch']}; everything is in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
