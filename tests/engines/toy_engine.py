"""An engine in one file: NumPy, a loop over the paper's equations, each with its derivative.

It is there to show what an `Engine` has to have, see `test_toy_engine.py`: it gets problems that
are checked, by plain calls as by the dispatcher. It keeps the states alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmixer_kernels.engines.protocol import EngineState
from mmixer_kernels.problem import Cotangents, Gradients, Keep, Need, Problem, Weights, gates

NAME = "toy"
DEVICES = ("cpu",)

Array = np.ndarray[Any, Any]
Value = tuple[Array, Callable[[Array], Any]]
"""A result, and the function from its gradient to those of what it is made of."""


def state(device: torch.device | None = None) -> EngineState:
    return EngineState(True, f"NumPy {np.__version__}")


def saved_size(problem: Problem, keep: Keep) -> int:
    groups, steps, batch, hidden = problem.sizes
    return 0 if keep == "nothing" else groups * steps * batch * hidden


def forward(problem: Problem, keep: Keep) -> tuple[Tensor, Tensor, Tensor]:
    groups, steps, batch, hidden = problem.sizes
    states = torch.empty(groups, steps, batch, hidden, dtype=problem.compute_dtype)
    h_n = torch.empty(groups, batch, hidden, dtype=problem.dtype)
    valid = _valid(problem)
    for g, every in enumerate(states.numpy()):
        unit = _Unit(problem, g)
        f_tilde, _ = unit.prologue(np.where(valid, unit.input, 0))
        h = unit.hx
        for t in unit.steps:
            h_next, _ = unit.step(f_tilde[t], h)
            h = every[t] = np.where(valid[t], h_next, h)
        h_n[g] = torch.from_numpy(h)
    output = torch.where(torch.from_numpy(valid), states, 0.0).to(problem.dtype)
    return output, h_n, states.flatten() if keep != "nothing" else states.new_empty(0)


def backward(
    problem: Problem, saved: Tensor, keep: Keep, cotangents: Cotangents, need: Need
) -> Gradients:
    grad_output, grad_h_n = cotangents.filled(problem)
    gradients = Gradients([], [], [], torch.empty_like(grad_h_n))
    valid = _valid(problem)
    states = saved.view(problem.sizes).numpy()
    for g in range(len(problem.inputs)):
        unit = _Unit(problem, g)
        f_tilde, through_prologue = unit.prologue(np.where(valid, unit.input, 0))
        d_output, dh = _array(grad_output[g], problem), _array(grad_h_n[g], problem)
        d_f_tilde = np.empty_like(f_tilde)
        previous = [unit.hx, *states[g, unit.steps[:-1]]]
        for t, h in zip(reversed(unit.steps), reversed(previous), strict=True):
            _, through_step = unit.step(f_tilde[t], h)
            d_f_tilde[t], before = through_step(np.where(valid[t], dh + d_output[t], 0))
            dh = before + np.where(valid[t], 0, dh)
        d_input, d_context = through_prologue(d_f_tilde)
        if problem.has_context:
            gradients.contexts.append(_like(problem.contexts[g], d_context))
        gradients.hx[g] = torch.from_numpy(dh)
        if need.input:
            gradients.inputs.append(_like(problem.inputs[g], d_input))
        if need.weights:
            pairs = zip(problem.weights[g], unit.grads, strict=True)
            gradients.weights.append(
                Weights(*(None if w is None else _like(w, grad) for w, grad in pairs))
            )
    return gradients


class _Unit:
    """One weight set with its sequence, in the compute dtype, and its weights' gradients."""

    def __init__(self, problem: Problem, g: int) -> None:
        _, steps, batch, hidden = problem.sizes
        self.steps = list(range(steps))[:: -1 if problem.directions[g] else 1]
        self.input = _array(problem.inputs[g], problem)
        self.context = _array(problem.contexts[g], problem) if problem.has_context else None
        self.gates = gates(problem.has_context)
        self.weights = problem.weights[g].map(lambda weight: _array(weight, problem))
        self.grads = self.weights.map(np.zeros_like)
        state = problem.states[g]
        self.hx = np.zeros((batch, hidden), self.input.dtype)
        if state is not None:
            self.hx = _array(state, problem)
        self.eps, self.mix = problem.eps, problem.mix

    def product(self, x: Array, gate: str) -> Value:
        """LN(W x) of one gate's weight."""
        weight, d_weight = (getattr(w, f"weight_{gate}") for w in (self.weights, self.grads))
        a = x @ weight.T
        y, through_norm = a, lambda dy: dy
        if self.weights.norm_weight is not None:
            y, through_norm = self.norm(a, self.gates.index(gate))

        def backward(dy: Array) -> Array:
            da = through_norm(dy)
            d_weight[...] += da.reshape(-1, da.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            return da @ weight

        return y, backward

    def norm(self, a: Array, row: int) -> Value:
        scale = self.weights.norm_weight[row]
        centred = a - a.mean(-1, keepdims=True)
        reciprocal = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + self.eps)
        normal = centred * reciprocal

        def backward(dy: Array) -> Array:
            summed = tuple(range(dy.ndim - 1))
            self.grads.norm_weight[row] += (dy * normal).sum(summed)
            self.grads.norm_bias[row] += dy.sum(summed)
            d = dy * scale
            along = (d * normal).mean(-1, keepdims=True)
            return reciprocal * (d - d.mean(-1, keepdims=True) - normal * along)

        return normal * scale + self.weights.norm_bias[row], backward

    def prologue(self, f: Array) -> Value:
        """Equations 7-10: f_tilde of all steps, which is f_bar without context."""
        a_f, through_f = self.product(f, "f")
        f_bar = np.tanh(a_f)
        if self.context is None:
            return f_bar, lambda d: (through_f(d * (1 - f_bar**2)), None)
        a_g, through_g = self.product(self.context, "g")
        g_bar = np.tanh(a_g)
        joint = np.concatenate([f_bar, np.broadcast_to(g_bar, f_bar.shape)], -1)
        mixed, through_s = self.product(joint, "s")
        s = _sigmoid(mixed)
        gated = self.mix == "gated"

        def backward(d: Array) -> tuple[Array, Array]:
            d_mixed = d * (f_bar - g_bar) * s * (1 - s) if gated else d
            d_f_bar, d_g_bar = np.split(through_s(d_mixed), 2, axis=-1)
            if gated:
                d_f_bar, d_g_bar = d_f_bar + d * s, d_g_bar + d * (1 - s)
            d_g_bar = d_g_bar.sum(0)
            return through_f(d_f_bar * (1 - f_bar**2)), through_g(d_g_bar * (1 - g_bar**2))

        return s * f_bar + (1 - s) * g_bar if gated else mixed, backward

    def step(self, x: Array, h: Array) -> Value:
        """Equations 11-14: the next state."""
        a_r, through_r = self.product(x + h, "r")
        a_z, through_z = self.product(x + h, "z")
        r, z = _sigmoid(a_r), _sigmoid(a_z)
        a_h, through_h = self.product(r * h + x, "h")
        h_tilde = np.tanh(a_h)

        def backward(d: Array) -> tuple[Array, Array]:
            d_inner = through_h(d * z * (1 - h_tilde**2))
            d_sum = through_r(d_inner * h * r * (1 - r))
            d_sum = d_sum + through_z(d * (h_tilde - h) * z * (1 - z))
            return d_inner + d_sum, d_inner * r + d_sum + d * (1 - z)

        return z * h_tilde + (1 - z) * h, backward


def _array(x: Tensor, problem: Problem) -> Array:
    return x.detach().to(problem.compute_dtype).numpy()


def _like(operand: Tensor, gradient: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(gradient)).to(operand.dtype)


def _valid(problem: Problem) -> Array:
    """`[T, B, 1]`: the steps up to each sample's length."""
    _, steps, batch, _ = problem.sizes
    if problem.lengths is None:
        return np.ones((steps, batch, 1), bool)
    return np.arange(steps)[:, None, None] < problem.lengths.numpy()[:, None]


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))
