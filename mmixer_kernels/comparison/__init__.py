"""A unit beside others, in one process: times in turns, memory, and what limits a call.

`print(describe(compare(Case.of(unit, input))))` in a script whose calls are slow prints what
`python -m mmixer_kernels.compare` does of a shape, with the script's own threads and settings.
"""

from .case import Case
from .checking import WrongResult
from .measure import compare
from .text import describe

__all__ = ["Case", "WrongResult", "compare", "describe"]
