"""The MCU in plain PyTorch, one line per equation of Lee et al., "Modality Mixer for
Multi-modal Action Recognition": the truth that every engine is tested against.

`mcu` is the forward, `mcu_backward` its hand-derived gradient (the map of the native
engines), `MCU` the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from . import arguments
from .problem import Problem, Weights, compute_dtype, gates
from .unit import Unit


def mcu(
    input: Tensor,
    context: Tensor | None,
    weights: Weights,
    hx: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    mix: str = "gated",
    eps: float = 1e-5,
    reverse: bool = False,
    layer_norm: Callable[..., Tensor] = F.layer_norm,
    loop: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Equations 7-14 over a sequence.

    Args:
        input: f `[T, B, input_size]`.
        context: g `[B, context_size]`, None where the weights have no `weight_g`: Eq. 8-10 fall
            away, and f_tilde is f_bar.
        weights: one weight set; without norms every LN is the identity.
        hx: h_0 `[B, H]`, zeros when None.
        lengths: `[B]`; past a sample's length the output is 0 and the state stands still.
        mix: "gated" (Eq. 9-10) or "concat" (Table 3, experiment II).
        eps: added to LayerNorm's variance.
        reverse: from each sample's last step to its first; output stands at the steps of the input.
        layer_norm: PyTorch's, which is fast and can be differentiated twice by autograd (its third
            derivative is wrong, and so is forward mode over forward mode, seen in 2.11 and 2.14),
            or this module's, any number of times in either way.
        loop: takes the steps in place of Python's `for`, see `in_order`.

    Returns:
        output `[T, B, H]` and h_n `[B, H]`, in the dtype of `input`.
    """
    dtype = input.dtype
    f = _without_padding(input, lengths).to(compute_dtype(dtype))
    w = weights.map(lambda x: x.to(f.dtype))
    rows = gates(context is not None)

    def norm(a: Tensor, gate: str, w: Weights) -> Tensor:
        if w.norm_weight is None or w.norm_bias is None:
            return a
        row = rows.index(gate)
        return layer_norm(a, a.shape[-1:], w.norm_weight[row], w.norm_bias[row], eps)

    f_bar = torch.tanh(norm(F.linear(f, w.weight_f), "f", w))  # Eq. 7
    f_tilde = f_bar
    if context is not None and w.weight_g is not None and w.weight_s is not None:
        g = context.to(f.dtype)
        g_bar = torch.tanh(norm(F.linear(g, w.weight_g), "g", w))  # Eq. 8
        joint = torch.cat([f_bar, g_bar.expand_as(f_bar)], dim=-1)
        mixed = norm(F.linear(joint, w.weight_s), "s", w)
        if mix == "gated":
            s = torch.sigmoid(mixed)  # Eq. 9
            f_tilde = s * f_bar + (1 - s) * g_bar  # Eq. 10
        else:
            f_tilde = mixed

    def step(h: Tensor, x: Tensor, valid: Tensor | None, w: Weights) -> tuple[Tensor, Tensor]:
        r = torch.sigmoid(norm(F.linear(x + h, w.weight_r), "r", w))  # Eq. 11
        z = torch.sigmoid(norm(F.linear(x + h, w.weight_z), "z", w))  # Eq. 12
        h_tilde = torch.tanh(norm(F.linear(r * h + x, w.weight_h), "h", w))  # Eq. 14
        h_next = z * h_tilde + (1 - z) * h  # Eq. 13
        if valid is None:
            return h_next, h_next
        h = torch.where(valid, h_next, h)
        return h, torch.where(valid, h, 0.0)

    h_0 = f_tilde.new_zeros(f_tilde.shape[1:]) if hx is None else hx.to(f.dtype)
    valid = None if lengths is None else _valid(input, lengths)
    if reverse:  # A sample's state stands still before its last step.
        f_tilde, valid = f_tilde.flip(0), None if valid is None else valid.flip(0)
    h_n, output = (loop or in_order)(step, h_0, f_tilde, valid, w)
    if reverse:
        output = output.flip(0)
    return output.to(dtype), h_n.to(dtype)


def mcu_group(problem: Problem, **options: Any) -> tuple[Tensor, Tensor]:
    """`mcu` of G weight sets: output `[G, T, B, H]` and h_n `[G, B, H]`.

    Args:
        problem: the weight sets and what they are called with.
        options: `layer_norm` and `loop` of `mcu`.
    """
    groups = each_group(problem)
    results = [mcu(*operands, **(keywords | options)) for operands, keywords in groups]
    # The result of torch.stack is a view, which autograd's functions do not let change in place.
    output, h_n = (
        torch.cat([tensor.unsqueeze(0) for tensor in tensors])
        for tensors in zip(*results, strict=True)
    )
    return output, h_n


_Operands = tuple[Tensor, Tensor | None, Weights, Tensor | None, Tensor | None]


def each_group(problem: Problem) -> Iterator[tuple[_Operands, dict[str, Any]]]:
    """The arguments of `mcu`, without `layer_norm` and `loop`, for each weight set."""
    inputs, _, sets, _, lengths, mix, eps, _ = problem
    contexts, states, directions = problem.each_context, problem.states, problem.directions
    for x, g, w, h, reverse in zip(inputs, contexts, sets, states, directions, strict=True):
        yield (x, g, w, h, lengths), {"mix": mix, "eps": eps, "reverse": reverse}


def in_order(
    step: Callable[..., tuple[Tensor, Tensor]],
    h: Tensor,
    f_tilde: Tensor,
    valid: Tensor | None,
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    """h_n `[B, H]` and output `[T, B, H]` of `step(h, f_tilde[t], valid[t], weights)`, which gives
    the next state and the step's output; valid is `[T, B, 1]`, or None where all steps are.

    All that a step computes with is handed to it, as torch's scan has it."""
    output = []
    for t, x in enumerate(f_tilde):
        h, y = step(h, x, None if valid is None else valid[t], weights)
        output.append(y)
    return h, torch.stack(output)


def layer_norm(
    a: Tensor, normalized_shape: Sequence[int], weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`torch.nn.functional.layer_norm` over the last dimension, of operations whose derivatives of
    any order are right."""
    centred = a - a.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def mcu_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    input: Tensor,
    context: Tensor | None,
    weights: Weights,
    hx: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    mix: str = "gated",
    eps: float = 1e-5,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None, Weights, Tensor]:
    """The gradient of `mcu`, derived by hand; the forward is computed again.

    Returns:
        The gradients of input, context, weights and hx, in the shapes and dtypes of `mcu`'s
        arguments (hx: `[B, H]`, also when it was None).
    """
    dtype = input.dtype
    f = _without_padding(input, lengths).to(compute_dtype(dtype))
    w = weights.map(lambda x: x.to(f.dtype))
    hidden_size = w.hidden_size
    rows = gates(context is not None)
    norm_grads = {gate: [f.new_zeros(hidden_size), f.new_zeros(hidden_size)] for gate in rows}

    def norm(a: Tensor, gate: str) -> tuple[Tensor, Tensor, Tensor]:
        """LN(a), and what its gradient needs: x_hat and 1 / standard deviation."""
        if w.norm_weight is None or w.norm_bias is None:
            return a, a, torch.ones_like(a[..., :1])
        row = rows.index(gate)
        centred = a - a.mean(-1, keepdim=True)
        r_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        x_hat = centred * r_std
        return x_hat * w.norm_weight[row] + w.norm_bias[row], x_hat, r_std

    def norm_backward(dy: Tensor, x_hat: Tensor, r_std: Tensor, gate: str) -> Tensor:
        if w.norm_weight is None:
            return dy
        norm_grads[gate][0] = norm_grads[gate][0] + (dy * x_hat).flatten(0, -2).sum(0)
        norm_grads[gate][1] = norm_grads[gate][1] + dy.flatten(0, -2).sum(0)
        u = dy * w.norm_weight[rows.index(gate)]
        projected = x_hat * (u * x_hat).mean(-1, keepdim=True)
        return r_std * (u - u.mean(-1, keepdim=True) - projected)

    def weight_grad(da: Tensor, x: Tensor) -> Tensor:
        return da.flatten(0, -2).T @ x.flatten(0, -2)

    y_f, x_hat_f, r_std_f = norm(F.linear(f, w.weight_f), "f")
    f_tilde = f_bar = torch.tanh(y_f)
    if context is not None and w.weight_g is not None and w.weight_s is not None:
        g = context.to(f.dtype)
        y_g, x_hat_g, r_std_g = norm(F.linear(g, w.weight_g), "g")
        g_bar = torch.tanh(y_g)
        w_sf, w_sg = w.weight_s[:, :hidden_size], w.weight_s[:, hidden_size:]
        y_s, x_hat_s, r_std_s = norm(F.linear(f_bar, w_sf) + F.linear(g_bar, w_sg), "s")
        s = torch.sigmoid(y_s)
        f_tilde = s * f_bar + (1 - s) * g_bar if mix == "gated" else y_s

    steps, batch = f.shape[:2]
    valid = torch.ones(steps, batch, 1, dtype=torch.bool, device=f.device)
    if lengths is not None:
        valid = _valid(f, lengths)
    if reverse:
        f_tilde, valid, grad_output = f_tilde.flip(0), valid.flip(0), grad_output.flip(0)

    h = f.new_zeros(batch, hidden_size) if hx is None else hx.to(f.dtype)
    tape = []
    for t, x in enumerate(f_tilde):
        y_r, x_hat_r, r_std_r = norm(F.linear(x + h, w.weight_r), "r")
        y_z, x_hat_z, r_std_z = norm(F.linear(x + h, w.weight_z), "z")
        r, z = torch.sigmoid(y_r), torch.sigmoid(y_z)
        y_h, x_hat_h, r_std_h = norm(F.linear(r * h + x, w.weight_h), "h")
        n = torch.tanh(y_h)
        tape.append((x, h, r, z, n, (x_hat_r, r_std_r), (x_hat_z, r_std_z), (x_hat_h, r_std_h)))
        h = torch.where(valid[t], z * n + (1 - z) * h, h)

    dh = grad_h_n.to(f.dtype)
    dw_r, dw_z, dw_h = (torch.zeros_like(x) for x in (w.weight_r, w.weight_z, w.weight_h))
    steps_df_tilde = []
    for t in reversed(range(steps)):
        x, h, r, z, n, norm_r, norm_z, norm_h = tape[t]
        d = torch.where(valid[t], dh + grad_output[t].to(f.dtype), 0.0)
        dz, dn = d * (n - h), d * z  # Eq. 13
        da_h = norm_backward(dn * (1 - n * n), *norm_h, "h")  # Eq. 14
        da_z = norm_backward(dz * z * (1 - z), *norm_z, "z")  # Eq. 12
        dv = da_h @ w.weight_h  # v = r h + f_tilde
        da_r = norm_backward(dv * h * r * (1 - r), *norm_r, "r")  # Eq. 11
        du = da_r @ w.weight_r + da_z @ w.weight_z  # u = f_tilde + h
        dw_r = dw_r + weight_grad(da_r, x + h)
        dw_z = dw_z + weight_grad(da_z, x + h)
        dw_h = dw_h + weight_grad(da_h, r * h + x)
        steps_df_tilde.append(dv + du)
        dh = torch.where(valid[t], d * (1 - z) + dv * r + du, dh)
    df_tilde = torch.stack(steps_df_tilde if reverse else steps_df_tilde[::-1])

    df_bar = df_tilde
    grad_context = dw_g = dw_s = None
    if context is not None and w.weight_g is not None:
        if mix == "gated":
            ds = df_tilde * (f_bar - g_bar)  # Eq. 10
            df_bar = df_tilde * s
            dg_bar = (df_tilde * (1 - s)).sum(0)
            da_s = norm_backward(ds * s * (1 - s), x_hat_s, r_std_s, "s")  # Eq. 9
        else:
            df_bar, dg_bar = torch.zeros_like(f_bar), torch.zeros_like(g_bar)
            da_s = norm_backward(df_tilde, x_hat_s, r_std_s, "s")
        df_bar = df_bar + da_s @ w_sf
        dg_bar = dg_bar + da_s.sum(0) @ w_sg
        da_g = norm_backward(dg_bar * (1 - g_bar * g_bar), x_hat_g, r_std_g, "g")  # Eq. 8
        dw_g = weight_grad(da_g, g)
        dw_s = torch.cat([weight_grad(da_s, f_bar), weight_grad(da_s.sum(0), g_bar)], dim=1)
        grad_context = (da_g @ w.weight_g).to(context.dtype)
    da_f = norm_backward(df_bar * (1 - f_bar * f_bar), x_hat_f, r_std_f, "f")  # Eq. 7

    grads = Weights(weight_grad(da_f, f), dw_g, dw_s, dw_r, dw_z, dw_h)
    if w.norm_weight is not None:
        scale, shift = zip(*norm_grads.values(), strict=True)
        grads = grads._replace(norm_weight=torch.stack(scale), norm_bias=torch.stack(shift))
    grad_input = (da_f @ w.weight_f).to(dtype)
    return grad_input, grad_context, grads.to_dtypes_of(weights), dh.to(dtype)


class MCU(Unit):
    """Multi-modal Contextualization Unit (Eq. 7-14) with `nn.GRU`'s conventions, in plain PyTorch.

    Args:
        input_size: d_f, the size of a step's features.
        context_size: (N-1) d_c, the size of the action content of the other modalities. 0 is a
            unit without context: Eq. 8-10 fall away, f_tilde is f_bar, and mix is not used.
        hidden_size: d_h.
        layer_norm: False replaces every LN by the identity.
        mix: "gated" is Eq. 9-10; "concat" is Table 3's experiment II, LN(W_s [f_bar || g_bar]).
        batch_first: input and output are `[B, T, ...]` instead of `[T, B, ...]`.
        eps: added to LayerNorm's variance.
        init: the initial values of the recurrent weights, `weight_r`, `weight_z` and `weight_h`:
            "uniform" as in `nn.GRU`, or "orthogonal", each a random orthogonal matrix.
        device: where the parameters are.
        dtype: the parameters' dtype.

    Raises:
        ValueError: a size below 1 (context_size: below 0), an unknown mix or init, or an eps that
            is not positive.
        TypeError: a dtype that is not float64, float32, bfloat16 or float16, or a layer_norm or
            batch_first that is no bool.

    The parameters are those of `Weights`; initial values as in `nn.GRU`: weights uniform in
    (-1/sqrt(H), 1/sqrt(H)), norms 1 and 0. As in the paper, projections have no bias.
    """

    weight_f: Tensor
    weight_g: Tensor | None
    weight_s: Tensor | None
    weight_r: Tensor
    weight_z: Tensor
    weight_h: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    def __init__(
        self,
        input_size: int,
        context_size: int,
        hidden_size: int,
        *,
        layer_norm: bool = True,
        mix: str = "gated",
        batch_first: bool = False,
        eps: float = 1e-5,
        init: str = "uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            context_size,
            hidden_size,
            {"": input_size},
            layer_norm=layer_norm,
            mix=mix,
            batch_first=batch_first,
            eps=eps,
            init=init,
            device=device,
            dtype=dtype,
        )

    def weights(self) -> Weights:
        """The parameters as one weight set."""
        return Weights._make(self._fields())

    def forward(
        self,
        input: Tensor | PackedSequence,
        context: Tensor | None = None,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Encodes a sequence in the light of `context`.

        Args:
            input: `[T, B, input_size]`, `[B, T, input_size]` when batch_first,
                `[T, input_size]` unbatched, or a PackedSequence.
            context: `[B, context_size]`, or `[context_size]` unbatched. A unit without context
                takes hx in its place, as `nn.GRU` does.
            hx: initial state `[1, B, H]` (`[1, H]` unbatched), zeros when None.
            lengths: integers `[B]` in 1..T: past a sample's length the input is not used, the
                output is 0 and h_n is the sample's own last valid step.

        Returns:
            output, like input with H features, and h_n `[1, B, H]` (`[1, H]` unbatched).

        Raises:
            ValueError: a wrong shape, device or length.
            TypeError: a wrong dtype.
        """
        if not self.context_size:
            context, hx = arguments.context_and_hx(context, hx)
        weights = self.weights()
        layout = arguments.Layout.of(input, self.batch_first)
        input, context, hx, lengths = layout.arrange(input, context, hx, lengths)
        contexts = [] if context is None else [context]
        problem = Problem([input], contexts, [weights], hx, lengths, self.mix, self.eps)
        arguments.check(problem)
        output, h_n = mcu_group(problem)
        return layout.restore(output.squeeze(0), h_n)


def _valid(input: Tensor, lengths: Tensor) -> Tensor:
    """`[T, B, 1]`: whether a step is within its sample's length."""
    steps = torch.arange(input.shape[0], device=input.device)
    return (steps[:, None] < lengths)[..., None]


def _without_padding(input: Tensor, lengths: Tensor | None) -> Tensor:
    """Input with zeros past each length, so that no value there can reach a gradient."""
    return input if lengths is None else torch.where(_valid(input, lengths), input, 0.0)
