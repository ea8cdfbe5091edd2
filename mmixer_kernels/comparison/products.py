"""The matrix products of a call: their operations, and the same products alone, by torch.

Equations 7-9 and 11-14 have no other operations that grow with H squared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .case import Case


class Product(NamedTuple):
    """A product `[rows, depth] x [depth, columns]`."""

    rows: int
    depth: int
    columns: int


class Products(NamedTuple):
    """Those that are made for all steps at once, and those of a step, which wait for the step
    before: in turn, T times."""

    at_once: list[Product]
    in_turn: list[Product]
    steps: int

    @classmethod
    def of(cls, case: Case, backward: bool) -> Products:
        """The products of a forward, or of a forward and the gradients of everything."""
        T, B, F, C, H = case.steps, case.batch, case.F, case.C, case.hidden_size
        weights = [(T * B, F, H)]  # W_f: rows, inputs and outputs of the layer
        if C:
            weights += [(B, C, H), (T * B, H, H), (B, H, H)]  # W_g, and both halves of W_s
        at_once = [Product(*x) for x in weights]
        in_turn = [Product(B, H, 2 * H), Product(B, H, H)]  # W_r and W_z in one, then W_h
        if backward:
            for rows, inputs, outputs in weights:
                at_once += [Product(rows, outputs, inputs), Product(outputs, rows, inputs)]
            at_once += [
                Product(2 * H, T * B, H),
                Product(H, T * B, H),
            ]  # gradients of W_r, W_z, W_h
            in_turn += [Product(B, H, H), Product(B, 2 * H, H)]
        return cls(at_once, in_turn, T)

    @property
    def operations(self) -> int:
        """Floating-point operations: a multiplication and an addition each."""
        return _operations(self.at_once) + self.steps * _operations(self.in_turn)


def _operations(products: Sequence[Product]) -> int:
    return sum(2 * rows * depth * columns for rows, depth, columns in products)


def alone(products: Sequence[Product], times: int, case: Case) -> Callable[[], None]:
    """A call that makes the products by `torch.mm`, one after another, so many times, of operands
    and into memory that is there already."""
    like: dict[str, Any] = {"device": case.device, "dtype": case.compute_dtype}
    made = [
        (torch.randn(m, k, **like), torch.randn(n, k, **like).t(), torch.empty(m, n, **like))
        for m, k, n in products
    ]

    def call() -> None:
        for _ in range(times):
            for left, right, result in made:
                torch.mm(left, right, out=result)

    return call
