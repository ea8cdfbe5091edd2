"""The call that is compared: a shape, a dtype, a device and an engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_dtype, check_sizes
from ..modules import FusedMCU
from ..problem import Problem, compute_dtype
from .checking import tolerance_of


@dataclass(frozen=True)
class Case:
    """A call of one `FusedMCU`.

    Args:
        steps: T.
        batch: B.
        hidden_size: H.
        input_size: the features of a step; H when None.
        context_size: the features of the context; H when None, and 0 is none.
        dtype: that of the operands and the parameters.
        device: the processor, or a GPU of CUDA or ROCm.
        engine: "auto" or an engine's name, as in `FusedMCU`.

    Raises:
        ValueError: a size that is below 1 (context_size: below 0), or another device.
        TypeError: a dtype that no unit has.
    """

    steps: int = 64
    batch: int = 8
    hidden_size: int = 512
    input_size: int | None = None
    context_size: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    engine: str = "auto"

    def __post_init__(self) -> None:
        for name in ("input_size", "context_size"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.hidden_size)
        named = {name: getattr(self, name) for name in ("steps", "batch", "hidden_size")}
        check_sizes(named | {"input_size": self.F, "context_size": self.C})
        check_dtype("dtype", self.dtype)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(
                "device must be cpu or cuda, which have the float64 that an engine is checked "
                f"against, but is {self.device}"
            )

    @classmethod
    def of(cls, unit: FusedMCU, input: Tensor) -> Case:
        """The case of a unit's call. Sizes and engine are the unit's, the parameters' dtype is the
        input's, and `layer_norm`, `mix`, `eps` and `recompute` are the defaults all the same.

        Args:
            unit: the unit that is called.
            input: `[T, B, input_size]`, or `[B, T, input_size]` where the unit has batch_first.

        Raises:
            TypeError: unit is no FusedMCU.
            ValueError: input has other dimensions than three.
        """
        if not isinstance(unit, FusedMCU):
            raise TypeError(f"unit must be a FusedMCU, but is a {type(unit).__name__}")
        if input.dim() != 3:
            raise ValueError(f"input must have three dimensions, but has {input.dim()}")
        steps, batch = input.shape[:2][:: -1 if unit.batch_first else 1]
        sizes = unit.hidden_size, unit.input_size, unit.context_size
        return cls(steps, batch, *sizes, input.dtype, input.device, unit.engine)

    @property
    def F(self) -> int:
        """input_size."""
        assert self.input_size is not None
        return self.input_size

    @property
    def C(self) -> int:
        """context_size."""
        assert self.context_size is not None
        return self.context_size

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the recurrence's products: on a CPU never narrower than float32."""
        return compute_dtype(self.dtype) if self.device.type == "cpu" else self.dtype

    @property
    def tolerance(self) -> float:
        """The largest relative error of an output or a gradient."""
        return tolerance_of(self.dtype, self.device)

    @property
    def like(self) -> dict[str, Any]:
        """The arguments `device` and `dtype` of whatever is made for the case."""
        return {"device": self.device, "dtype": self.dtype}

    @cached_property
    def unit(self) -> FusedMCU:
        """The unit, with parameters drawn from seed 0."""
        torch.manual_seed(0)
        return FusedMCU(self.F, self.C, self.hidden_size, engine=self.engine, **self.like)

    @cached_property
    def operands(self) -> list[Tensor]:
        """input `[T, B, F]` and, where there is one, context `[B, C]`."""
        return self.operands_of(self.steps, self.batch)

    def operands_of(self, steps: int, batch: int) -> list[Tensor]:
        """The operands of a call with as many steps and samples."""
        torch.manual_seed(1)
        shapes = [(steps, batch, self.F), *[(batch, self.C)] * (self.C > 0)]
        return [torch.randn(x, **self.like).requires_grad_() for x in shapes]

    @property
    def problem(self) -> Problem:
        """The call as the engines see it."""
        input, *contexts = self.operands
        return Problem([input], contexts, [self.unit.weights()])
