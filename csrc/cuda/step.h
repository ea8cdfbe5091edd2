// Equations 11-14 between the products with W_r, W_z and W_h: for all steps at once, which is how
// backward computes the gates again from the states, or for one step after the other, which is how sizes
// go for which there is no persistent kernel. A block owns a sample of a step.
#pragma once

#include "rows.h"

namespace mmixer::cuda {

template <class T>
struct GateRow {
  const GateArguments& a;
  int group, step, sample;
  int64_t place, local;  // of the sample of a step in [G][T][B] and in [G][steps][B]

  MMIXER_DEVICE explicit GateRow(const GateArguments& arguments) : a(arguments) {
    const int rows = a.steps * a.B, line = block_index() % rows;
    group = block_index() / rows, step = a.first_step + line / a.B, sample = line % a.B;
    place = (int64_t(group) * a.T + step) * a.B + sample;
    local = int64_t(group) * rows + line;
  }

  MMIXER_DEVICE T input(int gate, int i) const {
    return load(static_cast<const T*>(a.input_gates) + (place * gates + gate) * a.H + i);
  }
  MMIXER_DEVICE T state_gate(int gate, int i) const {
    return load(static_cast<const T*>(a.state_gates) + (local * 2 + gate) * a.H + i);
  }
  MMIXER_DEVICE T candidate(int i) const {
    return load(static_cast<const T*>(a.candidate) + local * a.H + i);
  }
  MMIXER_DEVICE T previous(int i) const {
    // Not by load(): another launch's store, but one kernel may read and write states.
    if (step > 0) return static_cast<const T*>(a.states)[(place - a.B) * a.H + i];
    return a.hx ? load(static_cast<const T*>(a.hx) + (int64_t(group) * a.B + sample) * a.H + i)
                : T(0);
  }
  MMIXER_DEVICE void save(int gate, int i, T x_hat, T r_std) const {
    const int64_t line = (int64_t(group) * gates + gate) * a.T * a.B + int64_t(step) * a.B + sample;
    static_cast<T*>(a.x_hat)[line * a.H + i] = x_hat;
    if (a.x_hat_operand) store_as(a.x_hat_operand, a.dtype, line * a.H + i, x_hat);
    if (i == 0) static_cast<T*>(a.r_std)[line] = r_std;
  }
  MMIXER_DEVICE Affine<T> affine(int norm) const {
    return {static_cast<const T*>(a.norms), a.G, group, norm, a.H};
  }
};

// r = sigmoid(LN(W_r (f_tilde + h))), and r h: Eq. 11.
template <class T>
struct ResetGate {
  using Arguments = GateArguments;
  using Shared = typename BlockSum<T, 1>::Shared;
  static constexpr int threads = row_threads;
  static constexpr bool needs_cluster = false;

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    const GateRow<T> row(a);
    BlockSum<T, 1> sum(*static_cast<Shared*>(memory));
    const Affine<T> affine = row.affine(norm_r);
    const auto a_r = [&](int i) { return row.input(gate_r, i) + row.state_gate(gate_r, i); };
    const auto s = statistics<T>(a_r, a.H, T(a.eps), affine.weight, sum);
    for (int i = thread_index(); i < a.H; i += threads) {
      const T x_hat = (a_r(i) - s.mean) * s.r_std, h = row.previous(i);
      const T r_h = Activation<false>::sigmoid(affine(i, x_hat)) * h;
      store_as(a.r_h, a.dtype, row.local * a.H + i, r_h);
      if (!a.x_hat) continue;
      row.save(gate_r, i, x_hat, s.r_std);
      const T f_tilde = load_as<T>(a.f_tilde, a.dtype, row.place * a.H + i);
      store_as(a.f_tilde_h, a.dtype, row.place * a.H + i, f_tilde + h);
      store_as(a.f_tilde_r_h, a.dtype, row.place * a.H + i, f_tilde + r_h);
    }
  }
};

// z = sigmoid(LN(W_z (f_tilde + h))), h = z tanh(LN(W_h (r h + f_tilde))) + (1 - z) h: Eq. 12-14.
template <class T>
struct UpdateGate {
  using Arguments = GateArguments;
  using Shared = typename BlockSum<T, 1>::Shared;
  static constexpr int threads = row_threads;
  static constexpr bool needs_cluster = false;

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    const GateRow<T> row(a);
    BlockSum<T, 1> sum(*static_cast<Shared*>(memory));
    const Affine<T> affine_z = row.affine(norm_z), affine_h = row.affine(norm_h);
    const auto a_z = [&](int i) { return row.input(gate_z, i) + row.state_gate(gate_z, i); };
    const auto a_h = [&](int i) { return row.input(gate_h, i) + row.candidate(i); };
    const auto s_z = statistics<T>(a_z, a.H, T(a.eps), affine_z.weight, sum);
    const auto s_h = statistics<T>(a_h, a.H, T(a.eps), affine_h.weight, sum);
    const bool valid = !a.lengths || row.step < load(a.lengths + row.sample);
    for (int i = thread_index(); i < a.H; i += threads) {
      const T x_hat_z = (a_z(i) - s_z.mean) * s_z.r_std;
      const T x_hat_h = (a_h(i) - s_h.mean) * s_h.r_std;
      if (a.x_hat) {
        row.save(gate_z, i, x_hat_z, s_z.r_std);
        row.save(gate_h, i, x_hat_h, s_h.r_std);
        continue;
      }
      const T z = Activation<false>::sigmoid(affine_z(i, x_hat_z));
      const T h_tilde = Activation<false>::tanh(affine_h(i, x_hat_h));
      T h = row.previous(i);
      if (valid) h = interpolate(z, h_tilde, h);
      static_cast<T*>(a.states)[row.place * a.H + i] = h;
      store_as(a.operand, a.dtype, (int64_t(row.group) * a.B + row.sample) * a.H + i, h);
    }
  }
};

template <class T>
struct GateBackwardRow {
  const GateBackwardArguments& a;
  int group, sample;
  int64_t state;  // of the sample in [G][B][H]

  MMIXER_DEVICE explicit GateBackwardRow(const GateBackwardArguments& arguments) : a(arguments) {
    group = block_index() / a.B, sample = block_index() % a.B;
    state = int64_t(block_index()) * a.H;
  }

  MMIXER_DEVICE int64_t place(int step) const {
    return (int64_t(group) * a.T + step) * a.B + sample;
  }
  MMIXER_DEVICE int64_t line(int gate) const {
    return (int64_t(group) * gates + gate) * a.T * a.B + int64_t(a.step) * a.B + sample;
  }
  MMIXER_DEVICE T x_hat(int gate, int i) const {
    return load(static_cast<const T*>(a.x_hat) + line(gate) * a.H + i);
  }
  MMIXER_DEVICE T r_std(int gate) const { return load(static_cast<const T*>(a.r_std) + line(gate)); }
  MMIXER_DEVICE bool valid(int step) const {
    return !a.lengths || step < load(a.lengths + sample);
  }
  MMIXER_DEVICE T previous(int i) const {
    if (a.step > 0)
      return load(static_cast<const T*>(a.states) + (place(a.step) - a.B) * a.H + i);
    return a.hx ? load(static_cast<const T*>(a.hx) + state + i) : T(0);
  }
  MMIXER_DEVICE Affine<T> affine(int gate) const {
    return {static_cast<const T*>(a.norms), a.G, group, norm_r + gate, a.H};
  }
  template <class X, class Dy, class Sum>
  MMIXER_DEVICE void gradient(int gate, X x_hat, Dy dy, Sum& sum) const {
    T* grad = static_cast<T*>(a.grad_norm);
    const int64_t size = int64_t(a.B) * a.H;
    if (grad) grad += (int64_t(group) * 2 * gates + gate) * size + int64_t(sample) * a.H;
    norm_gradient(x_hat, dy, r_std(gate), affine(gate), a.H, grad, grad + gates * size,
                  a.step == a.T - 1, sum, [&](int i, T x) {
                    store_as(a.grad_gates, a.dtype, (place(a.step) * gates + gate) * a.H + i, x);
                  });
  }
};

// Ends the step after, then the gradients of Eq. 13, 14 and 12: da_z, da_h.
template <class T>
struct UpdateGateBackward {
  using Arguments = GateBackwardArguments;
  using Shared = typename BlockSum<T, 2>::Shared;
  static constexpr int threads = row_threads;
  static constexpr bool needs_cluster = false;

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    const GateBackwardRow<T> row(a);
    BlockSum<T, 2> sum(*static_cast<Shared*>(memory));
    T* grad_h = static_cast<T*>(a.grad_h) + row.state;
    T* carry = static_cast<T*>(a.carry) + row.state;
    if (a.step + 1 < a.T)
      for (int i = thread_index(); i < a.H; i += threads) {
        const T d_sum = load(static_cast<const T*>(a.grad_sum) + row.state + i);
        const T d_r_h = load(static_cast<const T*>(a.grad_r_h) + row.state + i);
        static_cast<T*>(a.grad_f_tilde)[row.place(a.step + 1) * a.H + i] = d_r_h + d_sum;
        if (row.valid(a.step + 1)) grad_h[i] = carry[i] + d_sum;
      }
    if (a.step < 0) return;
    const bool valid = row.valid(a.step);
    const Affine<T> affine_z = row.affine(gate_z), affine_h = row.affine(gate_h);
    const auto x_hat_z = [&](int i) { return row.x_hat(gate_z, i); };
    const auto x_hat_h = [&](int i) { return row.x_hat(gate_h, i); };
    const auto z = [&](int i) { return Activation<false>::sigmoid(affine_z(i, x_hat_z(i))); };
    const auto h_tilde = [&](int i) { return Activation<false>::tanh(affine_h(i, x_hat_h(i))); };
    const auto d = [&](int i) {
      const int64_t place = row.group * a.grad_output_stride.group +
                            a.step * a.grad_output_stride.step +
                            row.sample * a.grad_output_stride.sample + i;
      return valid ? grad_h[i] + load_as<T>(a.grad_output, a.grad_output_dtype, place) : T(0);
    };
    for (int i = thread_index(); i < a.H; i += threads) carry[i] = d(i) - d(i) * z(i);
    row.gradient(gate_z, x_hat_z,
                 [&](int i) {
                   return sigmoid_backward(d(i) * (h_tilde(i) - row.previous(i)), z(i));
                 },
                 sum);
    row.gradient(gate_h, x_hat_h,
                 [&](int i) { return tanh_backward(d(i) * z(i), h_tilde(i)); }, sum);
  }
};

// The gradient of Eq. 11, da_r, and what reaches the state before through r h.
template <class T>
struct ResetGateBackward {
  using Arguments = GateBackwardArguments;
  using Shared = typename BlockSum<T, 2>::Shared;
  static constexpr int threads = row_threads;
  static constexpr bool needs_cluster = false;

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    const GateBackwardRow<T> row(a);
    BlockSum<T, 2> sum(*static_cast<Shared*>(memory));
    const Affine<T> affine = row.affine(gate_r);
    const T* grad_r_h = static_cast<const T*>(a.grad_r_h) + row.state;
    T* carry = static_cast<T*>(a.carry) + row.state;
    const auto x_hat = [&](int i) { return row.x_hat(gate_r, i); };
    const auto r = [&](int i) { return Activation<false>::sigmoid(affine(i, x_hat(i))); };
    for (int i = thread_index(); i < a.H; i += threads) carry[i] += load(grad_r_h + i) * r(i);
    row.gradient(gate_r, x_hat,
                 [&](int i) {
                   return sigmoid_backward(load(grad_r_h + i) * row.previous(i), r(i));
                 },
                 sum);
  }
};

}  // namespace mmixer::cuda
