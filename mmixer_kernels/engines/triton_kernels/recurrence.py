"""The recurrence and its gradient. A program owns BLOCK_B samples of one weight set for the whole
sequence. It works on BLOCK_N columns at a time, so that its registers do not depend on the hidden
size; what passes from columns to columns goes through memory (its own rows, in L1 and L2, a barrier
between). The weights are read again at each step, from L2, which is what bounds it. With
BIDIRECTIONAL the second half of the weight sets runs from the last step to the first, in the same
launch: every table is in the order of the inputs' steps."""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import (
    NORM_H,
    NORM_R,
    NORM_Z,
    affine,
    kernel,
    linear,
    multiply,
    norm_scale,
    normalised,
    of_set,
    sigmoid,
    tanh,
)


@kernel
def recurrence(
    input_gates, matrices, norms, hx, lengths, states, operands, a, T, B, H,
    eps: tl.constexpr, SETS: tl.constexpr, NORM_ROWS: tl.constexpr, HAS_HX: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, BIDIRECTIONAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Eq. 11-14 over the sequence. operands: `[2, G, B, H]`, for h and for r h; a: likewise, the
    pre-activations of r and z, then of h. z waits in the place of the step's state."""
    group = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    size = B.to(tl.int64) * H
    operand = operands.dtype.element_ty
    operand_h = operands + group * size
    operand_r_h = operand_h + SETS * size
    a_r = a + group * size
    a_z = a_r + SETS * size
    matrix_r = of_set(matrices, group, 0, SETS)
    matrix_z = of_set(matrices, group, 1, SETS)
    matrix_h = of_set(matrices, group, 2, SETS)
    previous = hx + group * size if HAS_HX else states
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask = (b < B) & (h < H)
        start = tl.zeros([BLOCK_B, BLOCK_N], operand)
        if HAS_HX:
            start = tl.load(previous + (b * H + h), mask=mask, other=0).to(operand)
        tl.store(operand_h + (b * H + h), start, mask=mask)
    reverse = BIDIRECTIONAL & (2 * group >= SETS)
    for step in range(T):
        t = tl.where(reverse, T - 1 - step, step)
        gate = input_gates + (group * T + t) * 3 * size
        current = states + (group * T + t) * size
        has_previous = (step > 0) | HAS_HX
        tl.debug_barrier()
        mean_r, std_r = linear(
            a_r, gate, operand_h, H, matrix_r, b, B, H, H, eps,
            True, NORM_ROWS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        mean_z, std_z = linear(
            a_z, gate + H, operand_h, H, matrix_z, b, B, H, H, eps,
            True, NORM_ROWS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, offset = (b < B) & (h < H), b * H + h
            r = sigmoid(
                normalised(
                    a_r, mean_r, std_r, norms, SETS, group, NORM_R, offset, mask, H, h, NORM_ROWS
                )
            )
            state = tl.load(previous + offset, mask=mask & has_previous, other=0)
            tl.store(operand_r_h + offset, (r * state).to(operand), mask=mask)
            z = sigmoid(
                normalised(
                    a_z, mean_z, std_z, norms, SETS, group, NORM_Z, offset, mask, H, h, NORM_ROWS
                )
            )
            tl.store(current + offset, z, mask=mask)
        tl.debug_barrier()
        mean_h, std_h = linear(
            a_r, gate + 2 * H, operand_r_h, H, matrix_h, b, B, H, H, eps,
            True, NORM_ROWS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, offset = (b < B) & (h < H), b * H + h
            x = tanh(
                normalised(
                    a_r, mean_h, std_h, norms, SETS, group, NORM_H, offset, mask, H, h, NORM_ROWS
                )
            )
            state = tl.load(previous + offset, mask=mask & has_previous, other=0)
            next_state = state + tl.load(current + offset, mask=mask, other=0) * (x - state)
            if HAS_LENGTHS:
                valid = t < tl.load(lengths + b, mask=b < B, other=0)
                next_state = tl.where(valid, next_state, state)
            tl.store(current + offset, next_state, mask=mask)
            tl.store(operand_h + offset, next_state.to(operand), mask=mask)
        previous = current


@triton.jit
def _add_to_norm(grad_norm, dy, x_hat, h, step, tiles, H):
    """Adds to the tile's sums of the gradient of a gate's norm."""
    old = (h < H) & (step > 0)
    scale = tl.sum(dy * x_hat, axis=0, keep_dims=True)
    tl.store(grad_norm + h, scale + tl.load(grad_norm + h, mask=old, other=0), mask=h < H)
    shift = grad_norm + 3 * tiles * H
    tl.store(
        shift + h,
        tl.sum(dy, axis=0, keep_dims=True) + tl.load(shift + h, mask=old, other=0),
        mask=h < H,
    )


@triton.jit
def _through_norm(
    grad_a, dy, x_hat, r_std, norms, sum_u, sum_u_x_hat, b, G, group, gate, B, H,
    NORM_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_a from dy; the sums are those of u = dy scale and u x_hat over the row."""
    std = tl.load(r_std + b, mask=b < B, other=0)
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask, offset = (b < B) & (h < H), b * H + h
        u = tl.load(dy + offset, mask=mask, other=0)
        if NORM_ROWS:
            x = tl.load(x_hat + offset, mask=mask, other=0)
            u = u * norm_scale(norms, G, group, gate, H, h, NORM_ROWS)
            u = std * (u - sum_u / H - x * (sum_u_x_hat / H))
        tl.store(grad_a + (b * 3 * H + h), u.to(grad_a.dtype.element_ty), mask=mask)


@kernel
def recurrence_backward(
    x_hat, r_std, matrices, norms, previous, lengths,
    grad_output, stride_group, stride_step, stride_sample,
    grad_h, grad_gates, grad_f_tilde, grad_norm, dy, T, B, H,
    SETS: tl.constexpr, NORM_ROWS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_h: of h_n, in the end of hx. grad_norm: `[G, 2, 3, tiles, H]`. dy: `[2, G, B, H]`, of
    LayerNorm's results of z and h, then of r."""
    group = tl.program_id(1).to(tl.int64)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    size = B.to(tl.int64) * H
    dtype = grad_f_tilde.dtype.element_ty
    dy_z = dy + group * size
    dy_h = dy_z + SETS * size
    grad_h += group * size
    matrix_r = of_set(matrices, group, 0, SETS)
    matrix_z = of_set(matrices, group, 1, SETS)
    matrix_h = of_set(matrices, group, 2, SETS)
    norm_r = grad_norm + (group * 6 * tiles + tile) * H if NORM_ROWS else grad_norm
    norm_z = norm_r + tiles * H if NORM_ROWS else grad_norm
    norm_h = norm_r + 2 * tiles * H if NORM_ROWS else grad_norm
    reverse = BIDIRECTIONAL & (2 * group >= SETS)
    for step in range(T):
        t = tl.where(reverse, step, T - 1 - step)
        x_r = x_hat + (group * 3 * T + t) * size
        x_z, x_h = x_r + T * size, x_r + 2 * T * size
        std_r = r_std + (group * 3 * T + t) * B
        std_z, std_h = std_r + T.to(tl.int64) * B, std_r + 2 * T.to(tl.int64) * B
        da = grad_gates + (group * T + t) * 3 * size
        state_before = previous + (group * T + t) * size
        grad_f = grad_f_tilde + (group * T + t) * size
        output = grad_output + (group * stride_group + t * stride_step)

        sum_z = tl.zeros([BLOCK_B, 1], dtype)
        sum_z_x = tl.zeros([BLOCK_B, 1], dtype)
        sum_h = tl.zeros([BLOCK_B, 1], dtype)
        sum_h_x = tl.zeros([BLOCK_B, 1], dtype)
        tl.debug_barrier()
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, offset = (b < B) & (h < H), b * H + h
            d = tl.load(output + (b * stride_sample + h), mask=mask, other=0).to(dtype)
            dh = tl.load(grad_h + offset, mask=mask, other=0)
            d += dh
            x = tl.load(x_z + offset, mask=mask, other=0)
            z = sigmoid(affine(x, norms, SETS, group, NORM_Z, H, h, NORM_ROWS))
            kept = d - d * z
            if HAS_LENGTHS:
                valid = t < tl.load(lengths + b, mask=b < B, other=0)
                d = tl.where(valid, d, 0)
                kept = tl.where(valid, kept, dh)
            tl.store(grad_h + offset, kept, mask=mask)
            y = tl.load(x_h + offset, mask=mask, other=0)
            h_tilde = tanh(affine(y, norms, SETS, group, NORM_H, H, h, NORM_ROWS))
            state = tl.load(state_before + offset, mask=mask, other=0)
            to_z = d * (h_tilde - state) * (z - z * z)
            to_h = d * z * (1 - h_tilde * h_tilde)
            tl.store(dy_z + offset, to_z, mask=mask)
            tl.store(dy_h + offset, to_h, mask=mask)
            if NORM_ROWS:
                _add_to_norm(norm_z, to_z, x, h, step, tiles, H)
                _add_to_norm(norm_h, to_h, y, h, step, tiles, H)
                to_z = to_z * norm_scale(norms, SETS, group, NORM_Z, H, h, NORM_ROWS)
                to_h = to_h * norm_scale(norms, SETS, group, NORM_H, H, h, NORM_ROWS)
                sum_z += tl.sum(to_z, axis=1, keep_dims=True)
                sum_z_x += tl.sum(to_z * x, axis=1, keep_dims=True)
                sum_h += tl.sum(to_h, axis=1, keep_dims=True)
                sum_h_x += tl.sum(to_h * y, axis=1, keep_dims=True)
        tl.debug_barrier()
        _through_norm(
            da + H,
            dy_z,
            x_z,
            std_z,
            norms,
            sum_z,
            sum_z_x,
            b,
            SETS,
            group,
            NORM_Z,
            B,
            H,
            NORM_ROWS,
            BLOCK_N,
        )
        _through_norm(
            da + 2 * H, dy_h, x_h, std_h, norms, sum_h, sum_h_x,
            b, SETS, group, NORM_H, B, H, NORM_ROWS, BLOCK_N,
        )  # fmt: skip
        tl.debug_barrier()

        sum_r = tl.zeros([BLOCK_B, 1], dtype)
        sum_r_x = tl.zeros([BLOCK_B, 1], dtype)
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, offset = (b < B) & (h < H), b * H + h
            total = tl.zeros([BLOCK_B, BLOCK_N], dtype)
            total = multiply(
                total, da + 2 * H, 3 * H, b, matrix_h, H, 1, B, H, H, h, BLOCK_K, PRECISION
            )
            tl.store(grad_f + offset, total, mask=mask)
            x = tl.load(x_r + offset, mask=mask, other=0)
            r = sigmoid(affine(x, norms, SETS, group, NORM_R, H, h, NORM_ROWS))
            dh = tl.load(grad_h + offset, mask=mask, other=0)
            tl.store(grad_h + offset, dh + total * r, mask=mask)
            state = tl.load(state_before + offset, mask=mask, other=0)
            to_r = total * state * (r - r * r)
            tl.store(dy_z + offset, to_r, mask=mask)
            if NORM_ROWS:
                _add_to_norm(norm_r, to_r, x, h, step, tiles, H)
                to_r = to_r * norm_scale(norms, SETS, group, NORM_R, H, h, NORM_ROWS)
                sum_r += tl.sum(to_r, axis=1, keep_dims=True)
                sum_r_x += tl.sum(to_r * x, axis=1, keep_dims=True)
        tl.debug_barrier()
        _through_norm(
            da,
            dy_z,
            x_r,
            std_r,
            norms,
            sum_r,
            sum_r_x,
            b,
            SETS,
            group,
            NORM_R,
            B,
            H,
            NORM_ROWS,
            BLOCK_N,
        )
        tl.debug_barrier()
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, offset = (b < B) & (h < H), b * H + h
            total = tl.zeros([BLOCK_B, BLOCK_N], dtype)
            total = multiply(total, da, 3 * H, b, matrix_r, H, 1, B, H, H, h, BLOCK_K, PRECISION)
            total = multiply(
                total, da + H, 3 * H, b, matrix_z, H, 1, B, H, H, h, BLOCK_K, PRECISION
            )
            tl.store(
                grad_f + offset, tl.load(grad_f + offset, mask=mask, other=0) + total, mask=mask
            )
            tl.store(
                grad_h + offset, tl.load(grad_h + offset, mask=mask, other=0) + total, mask=mask
            )
