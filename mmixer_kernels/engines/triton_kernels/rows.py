"""Row-wise kernels: a program owns one row, or a share of the rows where it sums over them."""

from __future__ import annotations

import triton.language as tl

from .functions import (
    NORM_R,
    NORM_S,
    affine,
    kernel,
    norm_backward,
    norm_scale,
    normalise,
    sigmoid,
    store_norm_sums,
    tanh,
)


@kernel
def norm_tanh(
    a, norms, y, G, rows, H, gate,
    eps: tl.constexpr, NORM_ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """y = tanh(LN(a)): Eq. 7, Eq. 8."""
    group, row = tl.program_id(1), tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    offset = (group * rows + row).to(tl.int64) * H + h
    x_hat, _ = normalise(tl.load(a + offset, mask=mask, other=0), mask, H, eps, NORM_ROWS)
    result = tanh(affine(x_hat, norms, G, group, gate, H, h, NORM_ROWS))
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=mask)


@kernel
def norm_tanh_backward(
    a, grad_y, grad_y_more, norms, grad_a, grad_norm, G, rows, H, gate,
    eps: tl.constexpr, NORM_ROWS: tl.constexpr, HAS_MORE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The gradient of y = tanh(LN(a)), from one or two that add up to y's."""
    group, first, programs = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    scale = norm_scale(norms, G, group, gate, H, h, NORM_ROWS)
    grad_scale = tl.zeros([1, BLOCK_H], a.dtype.element_ty)
    grad_shift = tl.zeros([1, BLOCK_H], a.dtype.element_ty)
    for row in range(first, rows, programs):
        offset = (group * rows + row).to(tl.int64) * H + h
        x = tl.load(a + offset, mask=mask, other=0)
        x_hat, r_std = normalise(x, mask, H, eps, NORM_ROWS)
        y = tanh(affine(x_hat, norms, G, group, gate, H, h, NORM_ROWS))
        dy = tl.load(grad_y + offset, mask=mask, other=0)
        if HAS_MORE:
            dy += tl.load(grad_y_more + offset, mask=mask, other=0)
        dy = dy - dy * y * y
        grad_scale += dy * x_hat
        grad_shift += dy
        da = norm_backward(dy, x_hat, r_std, scale, mask, H, NORM_ROWS)
        tl.store(grad_a + offset, da.to(grad_a.dtype.element_ty), mask=mask)
    summand = group * programs + first
    store_norm_sums(grad_norm, grad_scale, grad_shift, summand, H, h, mask, NORM_ROWS)


@kernel
def mix(
    a, context_s, norms, f_bar, g_bar, f_tilde, G, rows, B, H,
    eps: tl.constexpr, NORM_ROWS: tl.constexpr, CONCAT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Eq. 9, 10; with CONCAT LN(a + context_s)."""
    group, row = tl.program_id(1), tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    offset = (group * rows + row).to(tl.int64) * H + h
    sample = (group * B + row % B) * H + h
    x = tl.load(a + offset, mask=mask, other=0) + tl.load(context_s + sample, mask=mask, other=0)
    x_hat, _ = normalise(x, mask, H, eps, NORM_ROWS)
    y = affine(x_hat, norms, G, group, NORM_S, H, h, NORM_ROWS)
    if not CONCAT:
        f = tl.load(f_bar + offset, mask=mask, other=0).to(y.dtype)
        g = tl.load(g_bar + sample, mask=mask, other=0).to(y.dtype)
        y = g + sigmoid(y) * (f - g)
    tl.store(f_tilde + offset, y.to(f_tilde.dtype.element_ty), mask=mask)


@kernel
def mix_backward(
    a, context_s, norms, f_bar, g_bar, grad_f_tilde, grad_a, grad_f_bar, grad_g_bar, grad_norm,
    G, rows, B, H,
    eps: tl.constexpr, NORM_ROWS: tl.constexpr, CONCAT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The gradient of `mix`, a program for several rows of a weight set."""
    group, first, programs = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    scale = norm_scale(norms, G, group, NORM_S, H, h, NORM_ROWS)
    grad_scale = tl.zeros([1, BLOCK_H], a.dtype.element_ty)
    grad_shift = tl.zeros([1, BLOCK_H], a.dtype.element_ty)
    for row in range(first, rows, programs):
        offset = (group * rows + row).to(tl.int64) * H + h
        sample = (group * B + row % B) * H + h
        x = tl.load(a + offset, mask=mask, other=0) + tl.load(
            context_s + sample, mask=mask, other=0
        )
        x_hat, r_std = normalise(x, mask, H, eps, NORM_ROWS)
        dy = tl.load(grad_f_tilde + offset, mask=mask, other=0)
        if not CONCAT:
            s = sigmoid(affine(x_hat, norms, G, group, NORM_S, H, h, NORM_ROWS))
            f = tl.load(f_bar + offset, mask=mask, other=0).to(dy.dtype)
            g = tl.load(g_bar + sample, mask=mask, other=0).to(dy.dtype)
            tl.store(grad_f_bar + offset, dy * s, mask=mask)
            tl.store(grad_g_bar + offset, dy - dy * s, mask=mask)
            dy = dy * (f - g) * (s - s * s)
        grad_scale += dy * x_hat
        grad_shift += dy
        da = norm_backward(dy, x_hat, r_std, scale, mask, H, NORM_ROWS)
        tl.store(grad_a + offset, da.to(grad_a.dtype.element_ty), mask=mask)
    summand = group * programs + first
    store_norm_sums(grad_norm, grad_scale, grad_shift, summand, H, h, mask, NORM_ROWS)


@kernel
def reset_gate(
    input_gates, state_gates, f_tilde, previous, norms,
    x_hat_out, r_std_out, r_h_out, f_tilde_h, f_tilde_r_h,
    G, rows, H,
    eps: tl.constexpr, NORM_ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Eq. 11 for all steps, and the operands that it makes."""
    group, row = tl.program_id(1), tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    row_of_all = (group * rows + row).to(tl.int64)
    offset = row_of_all * H + h
    x = tl.load(input_gates + row_of_all * 3 * H + h, mask=mask, other=0)
    x += tl.load(state_gates + row_of_all * 2 * H + h, mask=mask, other=0)
    x_hat, r_std = normalise(x, mask, H, eps, NORM_ROWS)
    r = sigmoid(affine(x_hat, norms, G, group, NORM_R, H, h, NORM_ROWS))
    state = tl.load(previous + offset, mask=mask, other=0)
    f = tl.load(f_tilde + offset, mask=mask, other=0).to(x.dtype)
    operand = r_h_out.dtype.element_ty
    tl.store(r_h_out + offset, (r * state).to(operand), mask=mask)
    tl.store(f_tilde_h + offset, (f + state).to(operand), mask=mask)
    tl.store(f_tilde_r_h + offset, (f + r * state).to(operand), mask=mask)
    of_gate = (group * 3 * rows + row).to(tl.int64)
    tl.store(x_hat_out + of_gate * H + h, x_hat, mask=mask)
    tl.store(r_std_out + of_gate + tl.zeros_like(r_std).to(tl.int64), r_std)


@kernel
def update_gate(
    input_gates, state_gates, candidate, x_hat_out, r_std_out, rows, H,
    eps: tl.constexpr, NORM_ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """LayerNorm of Eq. 12 and 14 for all steps."""
    group, row = tl.program_id(1), tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    row_of_all = (group * rows + row).to(tl.int64)
    x = tl.load(input_gates + (row_of_all * 3 + 1) * H + h, mask=mask, other=0)
    x += tl.load(state_gates + (row_of_all * 2 + 1) * H + h, mask=mask, other=0)
    x_hat, r_std = normalise(x, mask, H, eps, NORM_ROWS)
    of_gate = ((group * 3 + 1) * rows + row).to(tl.int64)
    tl.store(x_hat_out + of_gate * H + h, x_hat, mask=mask)
    tl.store(r_std_out + of_gate + tl.zeros_like(r_std).to(tl.int64), r_std)
    x = tl.load(input_gates + (row_of_all * 3 + 2) * H + h, mask=mask, other=0)
    x += tl.load(candidate + row_of_all * H + h, mask=mask, other=0)
    x_hat, r_std = normalise(x, mask, H, eps, NORM_ROWS)
    of_gate += rows
    tl.store(x_hat_out + of_gate * H + h, x_hat, mask=mask)
    tl.store(r_std_out + of_gate + tl.zeros_like(r_std).to(tl.int64), r_std)
