"""The functions that the kernels share: activations, LayerNorm, and products of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

# A batch or a length must compile nothing: of the sizes, H alone is looked at, for aligned rows.
kernel = triton.jit(do_not_specialize=["G", "T", "B", "rows", "gate"])


# The rows of norm_weight and norm_bias, of which there are NORM_ROWS: 6, or 4 without context, or 0
# without LayerNorm. The recurrent gates' count from the end, as -1 does in Python.
NORM_F, NORM_G, NORM_S, NORM_R, NORM_Z, NORM_H = (
    tl.constexpr(row) for row in (0, 1, 2, -3, -2, -1)
)

# Triton's interpreter, which the tests use, multiplies bfloat16 operands' bits as integers.
WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """(1 - exp(-2 |x|)) / (1 + exp(-2 |x|)), with the sign of x."""
    # Not 1 - 2 / (exp(2 x) + 1) of a negative x, whose exponential would lose digits.
    small = tl.exp(-2 * tl.abs(x))
    y = (1 - small) / (1 + small)
    return tl.where(x < 0, -y, y)


@triton.jit
def normalise(x, mask, H, eps: tl.constexpr, NORM_ROWS: tl.constexpr):
    """x_hat and 1 / standard deviation of each row; without LayerNorm x and 1."""
    if NORM_ROWS:
        mean = tl.sum(x, axis=1, keep_dims=True) / H
        x = tl.where(mask, x - mean, 0)
        r_std = 1 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
        return x * r_std, r_std
    else:
        return x, tl.sum(x * 0, axis=1, keep_dims=True) + 1


@triton.jit
def norm_scale(norms, G, group, gate, H, h, NORM_ROWS: tl.constexpr):
    """A gate's norm_weight; without LayerNorm 1."""
    if NORM_ROWS:
        row = group * NORM_ROWS + (gate + NORM_ROWS) % NORM_ROWS
        return tl.load(norms + row * H + h, mask=h < H, other=0)
    else:
        return 1


@triton.jit
def affine(x_hat, norms, G, group, gate, H, h, NORM_ROWS: tl.constexpr):
    """x_hat times a gate's norm_weight plus its norm_bias; without LayerNorm x_hat."""
    if NORM_ROWS:
        row = (G + group) * NORM_ROWS + (gate + NORM_ROWS) % NORM_ROWS
        shift = tl.load(norms + row * H + h, mask=h < H, other=0)
        return x_hat * norm_scale(norms, G, group, gate, H, h, NORM_ROWS) + shift
    else:
        return x_hat


@triton.jit
def norm_backward(dy, x_hat, r_std, scale, mask, H, NORM_ROWS: tl.constexpr):
    """The gradient of LayerNorm's operand; without LayerNorm dy."""
    if NORM_ROWS:
        u = tl.where(mask, dy * scale, 0)
        mean_u = tl.sum(u, axis=1, keep_dims=True) / H
        mean_u_x_hat = tl.sum(u * x_hat, axis=1, keep_dims=True) / H
        return r_std * (u - mean_u - x_hat * mean_u_x_hat)
    else:
        return dy


@triton.jit
def store_norm_sums(
    grad_norm, grad_scale, grad_shift, summand, H, h, mask, NORM_ROWS: tl.constexpr
):  # fmt: skip
    """One summand `[2, H]` of the gradient of a gate's norm."""
    if NORM_ROWS:
        tl.store(grad_norm + summand * 2 * H + h, grad_scale, mask=mask)
        tl.store(grad_norm + (summand * 2 + 1) * H + h, grad_shift, mask=mask)


@triton.jit
def of_set(matrices, group, gate: tl.constexpr, SETS: tl.constexpr):
    """W_r, W_z or W_h of a weight set, of a tuple of 3 SETS."""
    matrix = matrices[gate]
    for i in tl.static_range(1, SETS):
        matrix = matrices[3 * i + gate] if group == i else matrix
    return matrix


@triton.jit
def multiply(
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
        if WIDEN:
            operand, weight = operand.to(total.dtype), weight.to(total.dtype)
        total = tl.dot(operand, weight, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def linear(
    a, start, x, x_stride, matrix, b, B, K, H, eps: tl.constexpr,
    HAS_START: tl.constexpr, NORM_ROWS: tl.constexpr, PRECISION: tl.constexpr,
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
        total = multiply(total, x, x_stride, b, matrix, 1, K, B, K, H, h, BLOCK_K, PRECISION)
        tl.store(a + (b * H + h), total, mask=mask)
        if NORM_ROWS:
            count = tl.minimum(BLOCK_N, H - first)
            mean_here = tl.sum(tl.where(h < H, total, 0), axis=1, keep_dims=True) / count
            centred = tl.where(h < H, total - mean_here, 0)
            share = count / (first + count).to(dtype)
            squares += tl.sum(centred * centred, axis=1, keep_dims=True)
            squares += (mean_here - mean) * (mean_here - mean) * share * first
            mean += (mean_here - mean) * share
    if NORM_ROWS:
        return mean, 1 / tl.sqrt(squares / H + eps)
    else:
        return mean, mean + 1


@triton.jit
def normalised(a, mean, r_std, norms, G, group, gate, offset, mask, H, h, NORM_ROWS: tl.constexpr):
    """LN of what `linear` left in a."""
    x = (tl.load(a + offset, mask=mask, other=0) - mean) * r_std
    return affine(x, norms, G, group, gate, H, h, NORM_ROWS)
