"""A unit beside others, in one process: times in turns, memory, and what limits a call.

`compare(Case(...))` gives what `python -m mmixer_kernels.compare` prints, of the process that calls
it: its threads, its environment, its settings of torch.
"""

from .case import Case
from .checking import WrongResult
from .measure import compare
from .text import describe

__all__ = ["Case", "WrongResult", "compare", "describe"]
