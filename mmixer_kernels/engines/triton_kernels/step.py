"""A step of the whole unit. A program owns BLOCK_B samples and reads all weights, BLOCK_N columns
at a time; what passes from columns to columns goes through memory, a barrier between. Bound by
reading the weights from L2."""

from __future__ import annotations

import triton.language as tl

from .functions import (
    NORM_F,
    NORM_G,
    NORM_H,
    NORM_R,
    NORM_S,
    NORM_Z,
    kernel,
    linear,
    normalised,
    sigmoid,
    tanh,
)


@kernel
def step(
    input, stride_input, context, stride_context, hx, stride_hx,
    weight_f, weight_g, weight_s, weight_r, weight_z, weight_h, norms,
    f_g, state_operand, mixed, a, output, B, F, C, H,
    eps: tl.constexpr, NORM_ROWS: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_HX: tl.constexpr,
    CONCAT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Eq. 7-14, one step of one weight set; without context Eq. 8-10 fall away. input `[B, F]`,
    context `[B, C]`; f_g: `[B, 2H]`, f_bar beside g_bar; a: `[2, B, H]`, the pre-activations in
    hand; state_operand, mixed: `[B, H]`; z waits in the place of f_tilde."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    operand = state_operand.dtype.element_ty
    a_second = a + B * H
    mean, std = linear(
        a, a, input, stride_input, weight_f, b, B, F, H, eps,
        False, NORM_ROWS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_CONTEXT:
        mean_g, std_g = linear(
            a_second, a, context, stride_context, weight_g, b, B, C, H, eps,
            False, NORM_ROWS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, offset = (b < B) & (h < H), b * H + h
            f = normalised(a, mean, std, norms, 1, 0, NORM_F, offset, mask, H, h, NORM_ROWS)
            tl.store(f_g + (b * 2 * H + h), tanh(f).to(operand), mask=mask)
            g = normalised(
                a_second, mean_g, std_g, norms, 1, 0, NORM_G, offset, mask, H, h, NORM_ROWS
            )
            tl.store(f_g + (b * 2 * H + H + h), tanh(g).to(operand), mask=mask)
        tl.debug_barrier()
        mean, std = linear(
            a, a, f_g, 2 * H, weight_s, b, B, 2 * H, H, eps,
            False, NORM_ROWS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    tl.debug_barrier()
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask, offset = (b < B) & (h < H), b * H + h
        if HAS_CONTEXT:
            x = normalised(a, mean, std, norms, 1, 0, NORM_S, offset, mask, H, h, NORM_ROWS)
            if not CONCAT:
                f = tl.load(f_g + (b * 2 * H + h), mask=mask, other=0).to(x.dtype)
                g = tl.load(f_g + (b * 2 * H + H + h), mask=mask, other=0).to(x.dtype)
                x = g + sigmoid(x) * (f - g)
        else:
            x = tanh(normalised(a, mean, std, norms, 1, 0, NORM_F, offset, mask, H, h, NORM_ROWS))
        tl.store(mixed + offset, x, mask=mask)
        if HAS_HX:
            x += tl.load(hx + (b * stride_hx + h), mask=mask, other=0).to(x.dtype)
        tl.store(state_operand + offset, x.to(operand), mask=mask)
    tl.debug_barrier()
    mean_r, std_r = linear(
        a, a, state_operand, H, weight_r, b, B, H, H, eps,
        False, NORM_ROWS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    mean_z, std_z = linear(
        a_second, a, state_operand, H, weight_z, b, B, H, H, eps,
        False, NORM_ROWS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask, offset = (b < B) & (h < H), b * H + h
        x = tl.load(mixed + offset, mask=mask, other=0)
        r = normalised(a, mean_r, std_r, norms, 1, 0, NORM_R, offset, mask, H, h, NORM_ROWS)
        if HAS_HX:
            x += sigmoid(r) * tl.load(hx + (b * stride_hx + h), mask=mask, other=0).to(x.dtype)
        tl.store(state_operand + offset, x.to(operand), mask=mask)
        z = normalised(a_second, mean_z, std_z, norms, 1, 0, NORM_Z, offset, mask, H, h, NORM_ROWS)
        tl.store(mixed + offset, sigmoid(z), mask=mask)
    tl.debug_barrier()
    mean_h, std_h = linear(
        a, a, state_operand, H, weight_h, b, B, H, H, eps,
        False, NORM_ROWS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask, offset = (b < B) & (h < H), b * H + h
        y = normalised(a, mean_h, std_h, norms, 1, 0, NORM_H, offset, mask, H, h, NORM_ROWS)
        y = tanh(y)
        z = tl.load(mixed + offset, mask=mask, other=0)
        if HAS_HX:
            state = tl.load(hx + (b * stride_hx + h), mask=mask, other=0).to(y.dtype)
            y = state + z * (y - state)
        else:
            y = z * y
        tl.store(output + offset, y.to(output.dtype.element_ty), mask=mask)
