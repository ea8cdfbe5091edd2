from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .base import Data


@dataclass(frozen=True)
class WatchOptions:
    recipe: ClassVar[dict[str, object]] = {}

    def load(self, root: Path | None, seed: int) -> Data:
        raise NotImplementedError
