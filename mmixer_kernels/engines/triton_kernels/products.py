"""Products with W_r, W_z and W_h over all steps, of all weight sets in one launch."""

from __future__ import annotations

import triton.language as tl

from .functions import kernel, multiply, of_set


@kernel
def products(
    x, matrices, y, rows, H, SETS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y `[G, rows, COUNT, H]`: all rows with the matrices FIRST, FIRST + 1, ... of their set. A
    program owns a tile of one matrix's result; the weights are read where they lie."""
    which = tl.program_id(2)
    group = (which // COUNT).to(tl.int64)
    gate = which % COUNT
    matrix = of_set(matrices, group, FIRST, SETS)
    for i in tl.static_range(1, COUNT):
        matrix = of_set(matrices, group, FIRST + i, SETS) if gate == i else matrix
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    h = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], y.dtype.element_ty)
    x += group * rows * H
    row = row.to(tl.int64)
    total = multiply(total, x, H, row, matrix, 1, H, rows, H, H, h, BLOCK_K, PRECISION)
    offset = ((group * rows + row) * COUNT + gate) * H + h
    tl.store(y + offset, total, mask=(row < rows) & (h < H))
