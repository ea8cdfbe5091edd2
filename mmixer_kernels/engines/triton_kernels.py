"""The kernels of the triton engine. Shapes are in the order of `gpu.Kernels`; T is the type of
statistics and states, float32 or float64; operands of products have theirs.

A row-wise program owns one row, or a share of the rows where it sums over them. A program of the
recurrence owns BLOCK_B samples of one weight set for the whole sequence. It works on BLOCK_N
columns at a time, so that its registers do not depend on the hidden size; what passes from columns
to columns goes through memory (its own rows, in L1 and L2, a barrier between). The weights are read
again at each step, from L2, which is what bounds it.
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
    a, context_s, norms, f_bar, g_bar, f_tilde, G, rows, B, H,
    eps: tl.constexpr, HAS_NORM: tl.constexpr, CONCAT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Eq. 9, 10; with CONCAT LN(a + context_s)."""
    group, row = tl.program_id(1), tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = h < H
    place = (group * rows + row).to(tl.int64) * H + h
    sample = (group * B + row % B) * H + h
    x = tl.load(a + place, mask=mask, other=0) + tl.load(context_s + sample, mask=mask, other=0)
    x_hat, _ = _normalise(x, mask, H, eps, HAS_NORM)
    y = _affine(x_hat, norms, G, group, 2, H, h, HAS_NORM)
    if not CONCAT:
        f = tl.load(f_bar + place, mask=mask, other=0).to(y.dtype)
        g = tl.load(g_bar + sample, mask=mask, other=0).to(y.dtype)
        y = g + _sigmoid(y) * (f - g)
    tl.store(f_tilde + place, y.to(f_tilde.dtype.element_ty), mask=mask)


@_kernel
def mix_backward(
    a, context_s, norms, f_bar, g_bar, grad_f_tilde, grad_a, grad_f_bar, grad_g_bar, grad_norm,
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
        x = tl.load(a + place, mask=mask, other=0) + tl.load(context_s + sample, mask=mask, other=0)
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
def _of_set(matrices, group, gate: tl.constexpr, SETS: tl.constexpr):
    """W_r, W_z or W_h of a weight set, of a tuple of 3 SETS."""
    matrix = matrices[gate]
    for i in tl.static_range(1, SETS):
        matrix = matrices[3 * i + gate] if group == i else matrix
    return matrix


@triton.jit
def _multiply(
    total, x, row_stride, b, matrix, stride_k, stride_h, B, K, H, h,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x W, `[B, K]` times `[K, H]`, of a program's samples and the columns h; b row_stride:
    x's sample b."""
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        operand = tl.load(
            x + (b * row_stride + k[None, :]), mask=(b < B) & (k[None, :] < K), other=0
        )
        weight = tl.load(
            matrix + (k[:, None] * stride_k + h * stride_h),
            mask=(k[:, None] < K) & (h < H),
            other=0,
        ).to(operand.dtype)
        if _WIDEN:
            operand, weight = operand.to(total.dtype), weight.to(total.dtype)
        total = tl.dot(operand, weight, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@_kernel
def products(
    x, matrices, y, rows, H, SETS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y `[G, rows, COUNT, H]`: all rows with the matrices FIRST, FIRST + 1, ... of their set. A
    program owns a tile of one matrix's result; the weights are read where they lie."""
    which = tl.program_id(2)
    group = (which // COUNT).to(tl.int64)
    gate = which % COUNT
    matrix = _of_set(matrices, group, FIRST, SETS)
    for i in tl.static_range(1, COUNT):
        matrix = _of_set(matrices, group, FIRST + i, SETS) if gate == i else matrix
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    h = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], y.dtype.element_ty)
    x += group * rows * H
    row = row.to(tl.int64)
    total = _multiply(total, x, H, row, matrix, 1, H, rows, H, H, h, BLOCK_K, PRECISION)
    place = ((group * rows + row) * COUNT + gate) * H + h
    tl.store(y + place, total, mask=(row < rows) & (h < H))


@triton.jit
def _linear(
    a, start, x, x_stride, matrix, b, B, K, H, eps: tl.constexpr,
    HAS_START: tl.constexpr, HAS_NORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a = x W^T, added to a gate's share in the input gates where there is a start; returns each
    row's mean and 1 / standard deviation.

    The columns' means and squares are put together as Chan, Golub and LeVeque do: without
    cancellation, and in an order that no batch or schedule changes.
    """
    dtype = a.dtype.element_ty
    mean = tl.zeros([BLOCK_B, 1], dtype)
    squares = tl.zeros([BLOCK_B, 1], dtype)
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask = (b < B) & (h < H)
        total = tl.zeros([BLOCK_B, BLOCK_N], dtype)
        if HAS_START:
            total = tl.load(start + (b * 3 * H + h), mask=mask, other=0)
        total = _multiply(total, x, x_stride, b, matrix, 1, K, B, K, H, h, BLOCK_K, PRECISION)
        tl.store(a + (b * H + h), total, mask=mask)
        if HAS_NORM:
            count = tl.minimum(BLOCK_N, H - first)
            mean_here = tl.sum(tl.where(h < H, total, 0), axis=1, keep_dims=True) / count
            centred = tl.where(h < H, total - mean_here, 0)
            share = count / (first + count).to(dtype)
            squares += tl.sum(centred * centred, axis=1, keep_dims=True)
            squares += (mean_here - mean) * (mean_here - mean) * share * first
            mean += (mean_here - mean) * share
    if HAS_NORM:
        return mean, 1 / tl.sqrt(squares / H + eps)
    else:
        return mean, mean + 1


@triton.jit
def _normalised(a, mean, r_std, norms, G, group, gate, place, mask, H, h, HAS_NORM: tl.constexpr):
    """LN of what `_linear` left in a."""
    x = (tl.load(a + place, mask=mask, other=0) - mean) * r_std
    return _affine(x, norms, G, group, gate, H, h, HAS_NORM)


@_kernel
def step(
    input, stride_input, context, stride_context, hx, stride_hx,
    weight_f, weight_g, weight_s, weight_r, weight_z, weight_h, norms,
    f_g, state_operand, mixed, a, output, B, F, C, H,
    eps: tl.constexpr, HAS_NORM: tl.constexpr, HAS_HX: tl.constexpr, CONCAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Eq. 7-14, one step of one weight set. input `[B, F]`, context `[B, C]`; f_g: `[B, 2H]`, f_bar
    beside g_bar; a: `[2, B, H]`, the pre-activations in hand; state_operand, mixed: `[B, H]`; z
    waits in the place of f_tilde."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    operand = f_g.dtype.element_ty
    a_second = a + B * H
    mean_f, std_f = _linear(
        a, a, input, stride_input, weight_f, b, B, F, H, eps,
        False, HAS_NORM, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    mean_g, std_g = _linear(
        a_second, a, context, stride_context, weight_g, b, B, C, H, eps,
        False, HAS_NORM, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask, place = (b < B) & (h < H), b * H + h
        f = _normalised(a, mean_f, std_f, norms, 1, 0, 0, place, mask, H, h, HAS_NORM)
        tl.store(f_g + (b * 2 * H + h), _tanh(f).to(operand), mask=mask)
        g = _normalised(a_second, mean_g, std_g, norms, 1, 0, 1, place, mask, H, h, HAS_NORM)
        tl.store(f_g + (b * 2 * H + H + h), _tanh(g).to(operand), mask=mask)
    tl.debug_barrier()
    mean_s, std_s = _linear(
        a, a, f_g, 2 * H, weight_s, b, B, 2 * H, H, eps,
        False, HAS_NORM, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask, place = (b < B) & (h < H), b * H + h
        x = _normalised(a, mean_s, std_s, norms, 1, 0, 2, place, mask, H, h, HAS_NORM)
        if not CONCAT:
            f = tl.load(f_g + (b * 2 * H + h), mask=mask, other=0).to(x.dtype)
            g = tl.load(f_g + (b * 2 * H + H + h), mask=mask, other=0).to(x.dtype)
            x = g + _sigmoid(x) * (f - g)
        tl.store(mixed + place, x, mask=mask)
        if HAS_HX:
            x += tl.load(hx + (b * stride_hx + h), mask=mask, other=0).to(x.dtype)
        tl.store(state_operand + place, x.to(operand), mask=mask)
    tl.debug_barrier()
    mean_r, std_r = _linear(
        a, a, state_operand, H, weight_r, b, B, H, H, eps,
        False, HAS_NORM, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    mean_z, std_z = _linear(
        a_second, a, state_operand, H, weight_z, b, B, H, H, eps,
        False, HAS_NORM, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask, place = (b < B) & (h < H), b * H + h
        x = tl.load(mixed + place, mask=mask, other=0)
        r = _normalised(a, mean_r, std_r, norms, 1, 0, 3, place, mask, H, h, HAS_NORM)
        if HAS_HX:
            x += _sigmoid(r) * tl.load(hx + (b * stride_hx + h), mask=mask, other=0).to(x.dtype)
        tl.store(state_operand + place, x.to(operand), mask=mask)
        z = _normalised(a_second, mean_z, std_z, norms, 1, 0, 4, place, mask, H, h, HAS_NORM)
        tl.store(mixed + place, _sigmoid(z), mask=mask)
    tl.debug_barrier()
    mean_h, std_h = _linear(
        a, a, state_operand, H, weight_h, b, B, H, H, eps,
        False, HAS_NORM, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.debug_barrier()
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask, place = (b < B) & (h < H), b * H + h
        y = _normalised(a, mean_h, std_h, norms, 1, 0, 5, place, mask, H, h, HAS_NORM)
        y = _tanh(y)
        z = tl.load(mixed + place, mask=mask, other=0)
        if HAS_HX:
            state = tl.load(hx + (b * stride_hx + h), mask=mask, other=0).to(y.dtype)
            y = state + z * (y - state)
        else:
            y = z * y
        tl.store(output + place, y.to(output.dtype.element_ty), mask=mask)


@_kernel
def recurrence(
    input_gates, matrices, norms, hx, lengths, states, operands, a, T, B, H,
    eps: tl.constexpr, SETS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_HX: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
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
    matrix_r = _of_set(matrices, group, 0, SETS)
    matrix_z = _of_set(matrices, group, 1, SETS)
    matrix_h = _of_set(matrices, group, 2, SETS)
    previous = hx + group * size if HAS_HX else states
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask = (b < B) & (h < H)
        start = tl.zeros([BLOCK_B, BLOCK_N], operand)
        if HAS_HX:
            start = tl.load(previous + (b * H + h), mask=mask, other=0).to(operand)
        tl.store(operand_h + (b * H + h), start, mask=mask)
    for t in range(T):
        gate = input_gates + (group * T + t) * 3 * size
        current = states + (group * T + t) * size
        has_previous = (t > 0) | HAS_HX
        tl.debug_barrier()
        mean_r, std_r = _linear(
            a_r, gate, operand_h, H, matrix_r, b, B, H, H, eps,
            True, HAS_NORM, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        mean_z, std_z = _linear(
            a_z, gate + H, operand_h, H, matrix_z, b, B, H, H, eps,
            True, HAS_NORM, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, place = (b < B) & (h < H), b * H + h
            r = _sigmoid(
                _normalised(a_r, mean_r, std_r, norms, SETS, group, 3, place, mask, H, h, HAS_NORM)
            )
            state = tl.load(previous + place, mask=mask & has_previous, other=0)
            tl.store(operand_r_h + place, (r * state).to(operand), mask=mask)
            z = _sigmoid(
                _normalised(a_z, mean_z, std_z, norms, SETS, group, 4, place, mask, H, h, HAS_NORM)
            )
            tl.store(current + place, z, mask=mask)
        tl.debug_barrier()
        mean_h, std_h = _linear(
            a_r, gate + 2 * H, operand_r_h, H, matrix_h, b, B, H, H, eps,
            True, HAS_NORM, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, place = (b < B) & (h < H), b * H + h
            x = _tanh(
                _normalised(a_r, mean_h, std_h, norms, SETS, group, 5, place, mask, H, h, HAS_NORM)
            )
            state = tl.load(previous + place, mask=mask & has_previous, other=0)
            next_state = state + tl.load(current + place, mask=mask, other=0) * (x - state)
            if HAS_LENGTHS:
                valid = t < tl.load(lengths + b, mask=b < B, other=0)
                next_state = tl.where(valid, next_state, state)
            tl.store(current + place, next_state, mask=mask)
            tl.store(operand_h + place, next_state.to(operand), mask=mask)
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
    HAS_NORM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_a from dy; the sums are those of u = dy scale and u x_hat over the row."""
    std = tl.load(r_std + b, mask=b < B, other=0)
    for first in range(0, H, BLOCK_N):
        h = first + tl.arange(0, BLOCK_N)[None, :]
        mask, place = (b < B) & (h < H), b * H + h
        u = tl.load(dy + place, mask=mask, other=0)
        if HAS_NORM:
            x = tl.load(x_hat + place, mask=mask, other=0)
            u = u * _scale(norms, G, group, gate, H, h, HAS_NORM)
            u = std * (u - sum_u / H - x * (sum_u_x_hat / H))
        tl.store(grad_a + (b * 3 * H + h), u.to(grad_a.dtype.element_ty), mask=mask)


@_kernel
def recurrence_backward(
    x_hat, r_std, matrices, norms, previous, lengths,
    grad_output, stride_group, stride_step, stride_sample,
    grad_h, grad_gates, grad_f_tilde, grad_norm, dy, T, B, H,
    SETS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
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
    matrix_r = _of_set(matrices, group, 0, SETS)
    matrix_z = _of_set(matrices, group, 1, SETS)
    matrix_h = _of_set(matrices, group, 2, SETS)
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

        sum_z = tl.zeros([BLOCK_B, 1], dtype)
        sum_z_x = tl.zeros([BLOCK_B, 1], dtype)
        sum_h = tl.zeros([BLOCK_B, 1], dtype)
        sum_h_x = tl.zeros([BLOCK_B, 1], dtype)
        tl.debug_barrier()
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, place = (b < B) & (h < H), b * H + h
            d = tl.load(output + (b * stride_sample + h), mask=mask, other=0).to(dtype)
            dh = tl.load(grad_h + place, mask=mask, other=0)
            d += dh
            x = tl.load(x_z + place, mask=mask, other=0)
            z = _sigmoid(_affine(x, norms, SETS, group, 4, H, h, HAS_NORM))
            kept = d - d * z
            if HAS_LENGTHS:
                valid = t < tl.load(lengths + b, mask=b < B, other=0)
                d = tl.where(valid, d, 0)
                kept = tl.where(valid, kept, dh)
            tl.store(grad_h + place, kept, mask=mask)
            y = tl.load(x_h + place, mask=mask, other=0)
            h_tilde = _tanh(_affine(y, norms, SETS, group, 5, H, h, HAS_NORM))
            state = tl.load(state_before + place, mask=mask, other=0)
            to_z = d * (h_tilde - state) * (z - z * z)
            to_h = d * z * (1 - h_tilde * h_tilde)
            tl.store(dy_z + place, to_z, mask=mask)
            tl.store(dy_h + place, to_h, mask=mask)
            if HAS_NORM:
                _add_to_norm(norm_z, to_z, x, h, step, tiles, H)
                _add_to_norm(norm_h, to_h, y, h, step, tiles, H)
                to_z = to_z * _scale(norms, SETS, group, 4, H, h, HAS_NORM)
                to_h = to_h * _scale(norms, SETS, group, 5, H, h, HAS_NORM)
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
            4,
            B,
            H,
            HAS_NORM,
            BLOCK_N,
        )
        _through_norm(
            da + 2 * H, dy_h, x_h, std_h, norms, sum_h, sum_h_x,
            b, SETS, group, 5, B, H, HAS_NORM, BLOCK_N,
        )  # fmt: skip
        tl.debug_barrier()

        sum_r = tl.zeros([BLOCK_B, 1], dtype)
        sum_r_x = tl.zeros([BLOCK_B, 1], dtype)
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, place = (b < B) & (h < H), b * H + h
            total = tl.zeros([BLOCK_B, BLOCK_N], dtype)
            total = _multiply(
                total, da + 2 * H, 3 * H, b, matrix_h, H, 1, B, H, H, h, BLOCK_K, PRECISION
            )
            tl.store(grad_f + place, total, mask=mask)
            x = tl.load(x_r + place, mask=mask, other=0)
            r = _sigmoid(_affine(x, norms, SETS, group, 3, H, h, HAS_NORM))
            dh = tl.load(grad_h + place, mask=mask, other=0)
            tl.store(grad_h + place, dh + total * r, mask=mask)
            state = tl.load(state_before + place, mask=mask, other=0)
            to_r = total * state * (r - r * r)
            tl.store(dy_z + place, to_r, mask=mask)
            if HAS_NORM:
                _add_to_norm(norm_r, to_r, x, h, step, tiles, H)
                to_r = to_r * _scale(norms, SETS, group, 3, H, h, HAS_NORM)
                sum_r += tl.sum(to_r, axis=1, keep_dims=True)
                sum_r_x += tl.sum(to_r * x, axis=1, keep_dims=True)
        tl.debug_barrier()
        _through_norm(
            da, dy_z, x_r, std_r, norms, sum_r, sum_r_x, b, SETS, group, 3, B, H, HAS_NORM, BLOCK_N
        )
        tl.debug_barrier()
        for first in range(0, H, BLOCK_N):
            h = first + tl.arange(0, BLOCK_N)[None, :]
            mask, place = (b < B) & (h < H), b * H + h
            total = tl.zeros([BLOCK_B, BLOCK_N], dtype)
            total = _multiply(total, da, 3 * H, b, matrix_r, H, 1, B, H, H, h, BLOCK_K, PRECISION)
            total = _multiply(
                total, da + H, 3 * H, b, matrix_z, H, 1, B, H, H, h, BLOCK_K, PRECISION
            )
            tl.store(grad_f + place, tl.load(grad_f + place, mask=mask, other=0) + total, mask=mask)
            tl.store(grad_h + place, tl.load(grad_h + place, mask=mask, other=0) + total, mask=mask)
