"""The kernels of the triton engine. Shapes are in the order of `gpu.Kernels`; T is the type of
statistics and states, float32 or float64; operands of products have theirs.

A row-wise program owns one row, or a share of the rows where it sums over them. A program of the
recurrence owns BLOCK_B samples of one weight set for the whole sequence: its state stays in
registers, the operands of its products pass through memory (its own rows, a barrier between), and
the weights are read again at each step, from L2, which is what bounds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter, which the tests use, multiplies bfloat16 operands' bits as integers.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


# A batch or a length must compile nothing: of the sizes, H alone is looked at, for aligned rows.
_kernel = triton.jit(do_not_specialize=["G", "T", "B", "rows", "gate"])


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # Not 1 - 2 / (exp(2 x) + 1) of a negative x, whose exponential would lose digits.
    small = tl.exp(-2 * tl.abs(x))
    y = (1 - small) / (1 + small)
    return tl.where(x < 0, -y, y)


@triton.jit
def _normalise(x, mask, H, eps: tl.constexpr, HAS_NORM: tl.constexpr):
    """x_hat and 1 / standard deviation of each row; without LayerNorm x and 1."""
    if HAS_NORM:
        mean = tl.sum(x, axis=1, keep_dims=True) / H
        x = tl.where(mask, x - mean, 0)
        r_std = 1 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
        return x * r_std, r_std
    else:
        return x, tl.sum(x * 0, axis=1, keep_dims=True) + 1


@triton.jit
def _scale(norms, G, group, gate, H, h, HAS_NORM: tl.constexpr):
    if HAS_NORM:
        return tl.load(norms + (group * 6 + gate) * H + h, mask=h < H, other=0)
    else:
        return 1


@triton.jit
def _affine(x_hat, norms, G, group, gate, H, h, HAS_NORM: tl.constexpr):
    if HAS_NORM:
        shift = tl.load(norms + ((G + group) * 6 + gate) * H + h, mask=h < H, other=0)
        return x_hat * _scale(norms, G, group, gate, H, h, HAS_NORM) + shift
    else:
        return x_hat


@triton.jit
def _norm_backward(dy, x_hat, r_std, scale, mask, H, HAS_NORM: tl.constexpr):
    if HAS_NORM:
        u = tl.where(mask, dy * scale, 0)
        mean_u = tl.sum(u, axis=1, keep_dims=True) / H
        mean_u_x_hat = tl.sum(u * x_hat, axis=1, keep_dims=True) / H
        return r_std * (u - mean_u - x_hat * mean_u_x_hat)
    else:
        return dy


@_kernel
def norm_tanh(
    a, norms, y, G, rows, H, gate,
    eps: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """y = tanh(LN(a)): Eq. 7, Eq. 8."""
    group, row = tl.program_id(1), tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    place = (group * rows + row).to(tl.int64) * H + h
    x_hat, _ = _normalise(tl.load(a + place, mask=mask, other=0), mask, H, eps, HAS_NORM)
    result = _tanh(_affine(x_hat, norms, G, group, gate, H, h, HAS_NORM))
    tl.store(y + place, result.to(y.dtype.element_ty), mask=mask)


@_kernel
def norm_tanh_backward(
    a, grad_y, grad_y_more, norms, grad_a, grad_norm, G, rows, H, gate,
    eps: tl.constexpr, HAS_NORM: tl.constexpr, HAS_MORE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    group, first, programs = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    scale = _scale(norms, G, group, gate, H, h, HAS_NORM)
    grad_scale = tl.zeros([1, BLOCK_H], a.dtype.element_ty)
    grad_shift = tl.zeros([1, BLOCK_H], a.dtype.element_ty)
    for row in range(first, rows, programs):
        place = (group * rows + row).to(tl.int64) * H + h
        x = tl.load(a + place, mask=mask, other=0)
        x_hat, r_std = _normalise(x, mask, H, eps, HAS_NORM)
        y = _tanh(_affine(x_hat, norms, G, group, gate, H, h, HAS_NORM))
        dy = tl.load(grad_y + place, mask=mask, other=0)
        if HAS_MORE:
            dy += tl.load(grad_y_more + place, mask=mask, other=0)
        dy = dy - dy * y * y
        grad_scale += dy * x_hat
        grad_shift += dy
        da = _norm_backward(dy, x_hat, r_std, scale, mask, H, HAS_NORM)
        tl.store(grad_a + place, da.to(grad_a.dtype.element_ty), mask=mask)
    if HAS_NORM:
        place = (group * programs + first) * 2 * H + h
        tl.store(grad_norm + place, grad_scale, mask=mask)
        tl.store(grad_norm + place + H, grad_shift, mask=mask)


@_kernel
def mix(
    a, context, norms, f_bar, g_bar, f_tilde, G, rows, B, H,
    eps: tl.constexpr, HAS_NORM: tl.constexpr, CONCAT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Eq. 9, 10; with CONCAT LN(a + context)."""
    group, row = tl.program_id(1), tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    place = (group * rows + row).to(tl.int64) * H + h
    sample = (group * B + row % B) * H + h
    x = tl.load(a + place, mask=mask, other=0) + tl.load(context + sample, mask=mask, other=0)
    x_hat, _ = _normalise(x, mask, H, eps, HAS_NORM)
    y = _affine(x_hat, norms, G, group, 2, H, h, HAS_NORM)
    if not CONCAT:
        f = tl.load(f_bar + place, mask=mask, other=0).to(y.dtype)
        g = tl.load(g_bar + sample, mask=mask, other=0).to(y.dtype)
        y = g + _sigmoid(y) * (f - g)
    tl.store(f_tilde + place, y.to(f_tilde.dtype.element_ty), mask=mask)


@_kernel
def mix_backward(
    a, context, norms, f_bar, g_bar, grad_f_tilde, grad_a, grad_f_bar, grad_g_bar, grad_norm,
    G, rows, B, H,
    eps: tl.constexpr, HAS_NORM: tl.constexpr, CONCAT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    group, first, programs = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    scale = _scale(norms, G, group, 2, H, h, HAS_NORM)
    grad_scale = tl.zeros([1, BLOCK_H], a.dtype.element_ty)
    grad_shift = tl.zeros([1, BLOCK_H], a.dtype.element_ty)
    for row in range(first, rows, programs):
        place = (group * rows + row).to(tl.int64) * H + h
        sample = (group * B + row % B) * H + h
        x = tl.load(a + place, mask=mask, other=0) + tl.load(context + sample, mask=mask, other=0)
        x_hat, r_std = _normalise(x, mask, H, eps, HAS_NORM)
        dy = tl.load(grad_f_tilde + place, mask=mask, other=0)
        if not CONCAT:
            s = _sigmoid(_affine(x_hat, norms, G, group, 2, H, h, HAS_NORM))
            f = tl.load(f_bar + place, mask=mask, other=0).to(dy.dtype)
            g = tl.load(g_bar + sample, mask=mask, other=0).to(dy.dtype)
            tl.store(grad_f_bar + place, dy * s, mask=mask)
            tl.store(grad_g_bar + place, dy - dy * s, mask=mask)
            dy = dy * (f - g) * (s - s * s)
        grad_scale += dy * x_hat
        grad_shift += dy
        da = _norm_backward(dy, x_hat, r_std, scale, mask, H, HAS_NORM)
        tl.store(grad_a + place, da.to(grad_a.dtype.element_ty), mask=mask)
    if HAS_NORM:
        place = (group * programs + first) * 2 * H + h
        tl.store(grad_norm + place, grad_scale, mask=mask)
        tl.store(grad_norm + place + H, grad_shift, mask=mask)


@_kernel
def reset_gate(
    input_gates, state_gates, f_tilde, previous, norms,
    x_hat_out, r_std_out, r_h_out, f_tilde_h, f_tilde_r_h,
    G, rows, H,
    eps: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Eq. 11 for all steps, and the operands that it makes."""
    group, row = tl.program_id(1), tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    line = (group * rows + row).to(tl.int64)
    place = line * H + h
    x = tl.load(input_gates + line * 3 * H + h, mask=mask, other=0)
    x += tl.load(state_gates + line * 2 * H + h, mask=mask, other=0)
    x_hat, r_std = _normalise(x, mask, H, eps, HAS_NORM)
    r = _sigmoid(_affine(x_hat, norms, G, group, 3, H, h, HAS_NORM))
    state = tl.load(previous + place, mask=mask, other=0)
    f = tl.load(f_tilde + place, mask=mask, other=0).to(x.dtype)
    operand = r_h_out.dtype.element_ty
    tl.store(r_h_out + place, (r * state).to(operand), mask=mask)
    tl.store(f_tilde_h + place, (f + state).to(operand), mask=mask)
    tl.store(f_tilde_r_h + place, (f + r * state).to(operand), mask=mask)
    of_gate = (group * 3 * rows + row).to(tl.int64)
    tl.store(x_hat_out + of_gate * H + h, x_hat, mask=mask)
    tl.store(r_std_out + of_gate + tl.zeros_like(r_std).to(tl.int64), r_std)


@_kernel
def update_gate(
    input_gates, state_gates, candidate, x_hat_out, r_std_out, rows, H,
    eps: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """LayerNorm of Eq. 12 and 14 for all steps."""
    group, row = tl.program_id(1), tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    line = (group * rows + row).to(tl.int64)
    x = tl.load(input_gates + (line * 3 + 1) * H + h, mask=mask, other=0)
    x += tl.load(state_gates + (line * 2 + 1) * H + h, mask=mask, other=0)
    x_hat, r_std = _normalise(x, mask, H, eps, HAS_NORM)
    of_gate = ((group * 3 + 1) * rows + row).to(tl.int64)
    tl.store(x_hat_out + of_gate * H + h, x_hat, mask=mask)
    tl.store(r_std_out + of_gate + tl.zeros_like(r_std).to(tl.int64), r_std)
    x = tl.load(input_gates + (line * 3 + 2) * H + h, mask=mask, other=0)
    x += tl.load(candidate + line * H + h, mask=mask, other=0)
    x_hat, r_std = _normalise(x, mask, H, eps, HAS_NORM)
    of_gate += rows
    tl.store(x_hat_out + of_gate * H + h, x_hat, mask=mask)
    tl.store(r_std_out + of_gate + tl.zeros_like(r_std).to(tl.int64), r_std)


@triton.jit
def _multiply(
    total, x, row_stride, b, matrix, stride_k, stride_h, B, H, h,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x W of a program's samples, `[BLOCK_B, BLOCK_H]`; b row_stride: x's sample b."""
    for first in range(0, H, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        operand = tl.load(
            x + (b * row_stride + k[None, :]), mask=(b < B) & (k[None, :] < H), other=0
        )
        weight = tl.load(
            matrix + (k[:, None] * stride_k + h * stride_h),
            mask=(k[:, None] < H) & (h < H),
            other=0,
        )
        if _WIDEN:
            operand, weight = operand.to(total.dtype), weight.to(total.dtype)
        total = tl.dot(operand, weight, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@_kernel
def recurrence(
    input_gates, matrices, norms, hx, lengths, states, operands, G, T, B, H,
    eps: tl.constexpr, HAS_NORM: tl.constexpr, HAS_HX: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Eq. 11-14 over the sequence. operands: `[2, G, B, H]`, for h and for r h.

    Nothing but a product's sum is in registers while the product runs: z waits in the place of the
    step's state.
    """
    group = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = (b < B) & (h < H)
    place = b * H + h
    operand = operands.dtype.element_ty
    operand_h = operands + group * B * H
    operand_r_h = operand_h + G.to(tl.int64) * B * H
    matrix = matrices + group * 3 * H * H
    size = B.to(tl.int64) * H
    previous = hx + group * size if HAS_HX else states
    first = tl.zeros([BLOCK_B, BLOCK_H], operand)
    if HAS_HX:
        first = tl.load(previous + place, mask=mask, other=0).to(operand)
    tl.store(operand_h + place, first, mask=mask)
    for t in range(T):
        tl.debug_barrier()
        gate = input_gates + (group * T + t) * 3 * size
        current = states + (group * T + t) * size
        has_previous = mask & ((t > 0) | HAS_HX)
        x = tl.load(gate + (b * 3 * H + h), mask=mask, other=0)
        x = _multiply(x, operand_h, H, b, matrix, 1, H, B, H, h, BLOCK_K, PRECISION)
        x, _ = _normalise(x, mask, H, eps, HAS_NORM)
        r = _sigmoid(_affine(x, norms, G, group, 3, H, h, HAS_NORM))
        state = tl.load(previous + place, mask=has_previous, other=0)
        tl.store(operand_r_h + place, (r * state).to(operand), mask=mask)
        x = tl.load(gate + (b * 3 * H + H + h), mask=mask, other=0)
        x = _multiply(x, operand_h, H, b, matrix + H * H, 1, H, B, H, h, BLOCK_K, PRECISION)
        x, _ = _normalise(x, mask, H, eps, HAS_NORM)
        z = _sigmoid(_affine(x, norms, G, group, 4, H, h, HAS_NORM))
        tl.store(current + place, z, mask=mask)
        tl.debug_barrier()
        x = tl.load(gate + (b * 3 * H + 2 * H + h), mask=mask, other=0)
        x = _multiply(x, operand_r_h, H, b, matrix + 2 * H * H, 1, H, B, H, h, BLOCK_K, PRECISION)
        x, _ = _normalise(x, mask, H, eps, HAS_NORM)
        x = _tanh(_affine(x, norms, G, group, 5, H, h, HAS_NORM))
        state = tl.load(previous + place, mask=has_previous, other=0)
        next_state = state + tl.load(current + place, mask=mask, other=0) * (x - state)
        if HAS_LENGTHS:
            next_state = tl.where(t < tl.load(lengths + b, mask=b < B, other=0), next_state, state)
        tl.store(current + place, next_state, mask=mask)
        tl.store(operand_h + place, next_state.to(operand), mask=mask)
        previous = current


@triton.jit
def _gate_backward(
    dy, x, r_std, norms, grad_norm, grad_gate, b, h, mask, G, group, gate, step, B, H, tiles,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Through LayerNorm: stores da; adds to the tile's sums of the norm's gradient."""
    if HAS_NORM:
        column = h < H
        old = column & (step > 0)
        shift = 3 * tiles * H
        total = tl.sum(dy * x, axis=0, keep_dims=True)
        tl.store(grad_norm + h, total + tl.load(grad_norm + h, mask=old, other=0), mask=column)
        total = tl.sum(dy, axis=0, keep_dims=True)
        total += tl.load(grad_norm + (shift + h), mask=old, other=0)
        tl.store(grad_norm + (shift + h), total, mask=column)
    std = tl.load(r_std + b, mask=b < B, other=0)
    scale = _scale(norms, G, group, gate, H, h, HAS_NORM)
    da = _norm_backward(dy, x, std, scale, mask, H, HAS_NORM)
    tl.store(grad_gate + (b * 3 * H + h), da.to(grad_gate.dtype.element_ty), mask=mask)


@_kernel
def recurrence_backward(
    x_hat, r_std, matrices, norms, previous, lengths,
    grad_output, stride_group, stride_step, stride_sample,
    grad_h, grad_gates, grad_f_tilde, grad_norm, G, T, B, H,
    HAS_NORM: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_h: of h_n, in the end of hx. grad_norm: `[G, 2, 3, tiles, H]`.

    As in `recurrence`, what a product does not need waits in memory: in the places of grad_h and of
    the step's grad_f_tilde.
    """
    group = tl.program_id(1).to(tl.int64)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = (b < B) & (h < H)
    place = b * H + h
    matrix = matrices + group * 3 * H * H
    size = B.to(tl.int64) * H
    dtype = grad_f_tilde.dtype.element_ty
    grad_h += group * size
    norm_r = grad_norm + (group * 6 * tiles + tile) * H if HAS_NORM else grad_norm
    norm_z = norm_r + tiles * H if HAS_NORM else grad_norm
    norm_h = norm_r + 2 * tiles * H if HAS_NORM else grad_norm
    for step in range(T):
        t = T - 1 - step
        x_r = x_hat + (group * 3 * T + t) * size
        x_z, x_h = x_r + T * size, x_r + 2 * T * size
        std_r = r_std + (group * 3 * T + t) * B
        std_z, std_h = std_r + T.to(tl.int64) * B, std_r + 2 * T.to(tl.int64) * B
        da = grad_gates + (group * T + t) * 3 * size
        state_before = previous + (group * T + t) * size
        grad_f = grad_f_tilde + (group * T + t) * size

        output = grad_output + (group * stride_group + t * stride_step)
        d = tl.load(output + (b * stride_sample + h), mask=mask, other=0).to(dtype)
        dh = tl.load(grad_h + place, mask=mask, other=0)
        d += dh
        x = tl.load(x_z + place, mask=mask, other=0)
        z = _sigmoid(_affine(x, norms, G, group, 4, H, h, HAS_NORM))
        if HAS_LENGTHS:
            valid = t < tl.load(lengths + b, mask=b < B, other=0)
            d = tl.where(valid, d, 0)
            tl.store(grad_h + place, tl.where(valid, d - d * z, dh), mask=mask)
        else:
            tl.store(grad_h + place, d - d * z, mask=mask)
        x = tl.load(x_h + place, mask=mask, other=0)
        h_tilde = _tanh(_affine(x, norms, G, group, 5, H, h, HAS_NORM))
        _gate_backward(
            d * z * (1 - h_tilde * h_tilde), x, std_h, norms, norm_h, da + 2 * H,
            b, h, mask, G, group, 5, step, B, H, tiles, HAS_NORM,
        )  # fmt: skip
        x = tl.load(x_z + place, mask=mask, other=0)
        state = tl.load(state_before + place, mask=mask, other=0)
        _gate_backward(
            d * (h_tilde - state) * (z - z * z), x, std_z, norms, norm_z, da + H,
            b, h, mask, G, group, 4, step, B, H, tiles, HAS_NORM,
        )  # fmt: skip
        tl.debug_barrier()

        total = tl.zeros([BLOCK_B, BLOCK_H], dtype)
        total = _multiply(
            total, da + 2 * H, 3 * H, b, matrix + 2 * H * H, H, 1, B, H, h, BLOCK_K, PRECISION
        )
        tl.store(grad_f + place, total, mask=mask)
        x = tl.load(x_r + place, mask=mask, other=0)
        r = _sigmoid(_affine(x, norms, G, group, 3, H, h, HAS_NORM))
        dh = tl.load(grad_h + place, mask=mask, other=0)
        tl.store(grad_h + place, dh + total * r, mask=mask)
        state = tl.load(state_before + place, mask=mask, other=0)
        _gate_backward(
            total * state * (r - r * r), x, std_r, norms, norm_r, da,
            b, h, mask, G, group, 3, step, B, H, tiles, HAS_NORM,
        )  # fmt: skip
        tl.debug_barrier()

        total = tl.zeros([BLOCK_B, BLOCK_H], dtype)
        total = _multiply(total, da, 3 * H, b, matrix, H, 1, B, H, h, BLOCK_K, PRECISION)
        total = _multiply(
            total, da + H, 3 * H, b, matrix + H * H, H, 1, B, H, h, BLOCK_K, PRECISION
        )
        tl.store(grad_f + place, tl.load(grad_f + place, mask=mask, other=0) + total, mask=mask)
        tl.store(grad_h + place, tl.load(grad_h + place, mask=mask, other=0) + total, mask=mask)
