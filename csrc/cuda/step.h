// Equations 11-14 between the products with W_r, W_z and W_h: for all steps at once, where backward
// computes the gates again from the states, or for one step after the other, at sizes for which
// there is no persistent kernel. A block owns one sample of one step.
#pragma once

#include "order.h"
#include "rows.h"

namespace mmixer::cuda {

// Whether a step is one of the sample's own, and not past its length.
template <class Arguments>
MMIXER_DEVICE bool is_own_step(int step, int sample, bool reverse, const Arguments& a) {
  return !a.lengths || OwnSteps(int(load(a.lengths + sample)), a.T, reverse).contain(step);
}

template <Dtype dtype>
struct GateRow {
  using T = Wide<dtype>;
  using WideRow = Row<wide<dtype>>;
  const GateArguments& a;
  int group, step, sample;
  int row_in_launch;  // this block's, of its weight set

  MMIXER_DEVICE explicit GateRow(const GateArguments& arguments) : a(arguments) {
    const int rows = a.steps * a.B;
    row_in_launch = block_index() % rows;
    group = block_index() / rows, step = a.first_step + row_in_launch / a.B,
    sample = row_in_launch % a.B;
  }

  MMIXER_DEVICE int64_t offset(const Rows& rows) const {
    return group * rows.stride_group + row_in_launch * rows.stride_row;
  }
  MMIXER_DEVICE WideRow wide_row(const Rows& rows) const { return {rows.p, offset(rows), a.H}; }
  // The sample's first element in [G][B][H].
  MMIXER_DEVICE int64_t sample_element() const { return (int64_t(group) * a.B + sample) * a.H; }
  MMIXER_DEVICE int64_t state(int step) const {
    return group * a.states_stride.group + step * a.states_stride.step +
           sample * a.states_stride.sample;
  }
  MMIXER_DEVICE Row<wide<dtype>, false> previous() const {  // one kernel may read and write states
    if (step > 0) return {a.states, state(step - 1), a.H};
    return {a.hx, sample_element(), a.hx ? a.H : 0};
  }
  MMIXER_DEVICE Affine<wide<dtype>> affine(int norm) const {
    return {a.norms, a.G, group, norm, a.H};
  }

  MMIXER_DEVICE int64_t gate_row(int gate) const {  // in [G][3][T][B]
    return ((int64_t(group) * step_gates + gate) * a.T + step) * a.B + sample;
  }

  // Saves the values of a gate's LayerNorm that backward needs.
  template <class X>
  MMIXER_DEVICE void save(int gate, const X& x_hat, T r_std) const {
    const int64_t gate_row = this->gate_row(gate);
    const Result<wide<dtype>> exact(a.x_hat, gate_row * a.H);
    const Result<dtype> operand(a.x_hat_operand, gate_row * a.H);
    each_column(a.H, [&](Column c) {
      exact(c, x_hat(c));
      if (a.x_hat_operand) operand(c, x_hat(c));
    });
    if (thread_index() == 0) static_cast<T*>(a.r_std)[gate_row] = r_std;
  }
};

// r = sigmoid(LN(W_r (f_tilde + h))), and r h: Eq. 11.
template <Dtype dtype>
struct ResetGate : RowKernel<dtype, GateArguments> {
  MMIXER_DEVICE static void run(void* shared, const GateArguments& a) {
    using T = Wide<dtype>;
    const GateRow<dtype> own(a);
    const auto input = own.wide_row(a.input[step_r]), state_gate = own.wide_row(a.state[step_r]);
    const auto h = own.previous();
    const Row<dtype> f_tilde(a.f_tilde.p, own.offset(a.f_tilde), a.weight_operands ? a.H : 0);
    const auto affine = own.affine(gate_r);
    RowBlock<T> block(shared, a.H);
    const Held x(a.H, [&](Column c) { return input(c) + state_gate(c); });
    const auto normal = normalization(x, block, T(a.eps), affine.exists);
    const auto x_hat = [&](Column c) { return normal(x(c)); };
    const Held r_h(a.H, [&](Column c) {
      return Activation<false>::sigmoid(affine(c, x_hat(c))) * h(c);
    });
    const Result<dtype> to_r_h(a.r_h,
                               own.group * a.r_h_stride_group + int64_t(own.row_in_launch) * a.H);
    each_column(a.H, [&](Column c) { to_r_h(c, r_h(c)); });
    if (!a.x_hat) return;
    own.save(step_r, x_hat, normal.r_std);
    if (!a.weight_operands) return;
    const Result<dtype> to_r(a.weight_operands, own.gate_row(step_r) * a.H),
        to_z(a.weight_operands, own.gate_row(step_z) * a.H),
        to_h(a.weight_operands, own.gate_row(step_h) * a.H);
    each_column(a.H, [&](Column c) {
      const T f_tilde_h = f_tilde(c) + h(c);
      to_r(c, f_tilde_h), to_z(c, f_tilde_h), to_h(c, f_tilde(c) + r_h(c));
    });
  }
};

// z = sigmoid(LN(W_z (f_tilde + h))), h = z tanh(LN(W_h (r h + f_tilde))) + (1 - z) h: Eq. 12-14.
template <Dtype dtype>
struct UpdateGate : RowKernel<dtype, GateArguments> {
  MMIXER_DEVICE static void run(void* shared, const GateArguments& a) {
    using T = Wide<dtype>;
    const GateRow<dtype> own(a);
    const auto input_z = own.wide_row(a.input[step_z]), input_h = own.wide_row(a.input[step_h]);
    const auto state_gate = own.wide_row(a.state[step_z]);
    const auto candidate = own.wide_row(a.state[step_h]);
    RowBlock<T> block(shared, a.H);
    const Held x_z(a.H, [&](Column c) { return input_z(c) + state_gate(c); });
    const Held x_h(a.H, [&](Column c) { return input_h(c) + candidate(c); });
    const auto normal_z = normalization(x_z, block, T(a.eps), a.norms.p);
    const auto normal_h = normalization(x_h, block, T(a.eps), a.norms.p);
    const auto x_hat_z = [&](Column c) { return normal_z(x_z(c)); };
    const auto x_hat_h = [&](Column c) { return normal_h(x_h(c)); };
    if (a.x_hat) {
      own.save(step_z, x_hat_z, normal_z.r_std);
      own.save(step_h, x_hat_h, normal_h.r_std);
      return;
    }
    const auto affine_z = own.affine(gate_z), affine_h = own.affine(gate_h);
    const auto h = own.previous();
    const Result<wide<dtype>> states(a.states, own.state(own.step));
    const bool reverse = own.group >= a.first_reverse;
    const RunRows output_rows(a.output_stride, own.group, own.sample, a.T, reverse);
    const Result<dtype> operand(a.operand, own.sample_element()),
        output(a.output, output_rows.first + own.step * output_rows.step),
        h_n(a.h_n, own.sample_element());
    const bool last = own.step == a.T - 1;
    const bool valid = is_own_step(own.step, own.sample, reverse, a);
    each_column(a.H, [&](Column c) {
      const T z = Activation<false>::sigmoid(affine_z(c, x_hat_z(c)));
      const T h_tilde = Activation<false>::tanh(affine_h(c, x_hat_h(c)));
      const T next = valid ? interpolate(z, h_tilde, h(c)) : h(c);
      states(c, next), operand(c, next), output(c, valid ? next : T(0));
      if (last) h_n(c, next);
    });
  }
};

template <Dtype dtype>
struct GateBackwardRow {
  using T = Wide<dtype>;
  using WideRow = Row<wide<dtype>>;
  const GateBackwardArguments& a;
  int group, sample;
  bool reverse;
  int64_t state_offset;  // the sample's first element in [G][B][H]

  MMIXER_DEVICE explicit GateBackwardRow(const GateBackwardArguments& arguments) : a(arguments) {
    group = block_index() / a.B, sample = block_index() % a.B;
    reverse = group >= a.first_reverse;
    state_offset = int64_t(block_index()) * a.H;
  }

  MMIXER_DEVICE int64_t row(int step) const { return (int64_t(group) * a.T + step) * a.B + sample; }
  MMIXER_DEVICE int64_t gate_row(int gate) const {
    return (int64_t(group) * step_gates + gate) * a.T * a.B + int64_t(a.step) * a.B + sample;
  }
  MMIXER_DEVICE WideRow x_hat(int gate) const { return {a.x_hat, gate_row(gate) * a.H, a.H}; }
  MMIXER_DEVICE bool valid(int step) const { return is_own_step(step, sample, reverse, a); }
  MMIXER_DEVICE WideRow previous() const {
    if (a.step > 0) return {a.states, (row(a.step) - a.B) * a.H, a.H};
    return {a.hx, state_offset, a.hx ? a.H : 0};
  }
  MMIXER_DEVICE Affine<wide<dtype>> affine(int gate) const {
    return {a.norms, a.G, group, gate_r + gate, a.H};
  }

  template <class X, class Dy>
  MMIXER_DEVICE void gradient(int gate, const X& x_hat, const Dy& dy,
                              const Affine<wide<dtype>>& affine, RowBlock<T>& block) const {
    const auto sum = [&](int of) {
      const int64_t sum_row = ((int64_t(group) * 2 + of) * step_gates + gate) * a.B + sample;
      return RowSum<T>(a.grad_norm, sum_row * a.H, a.H, a.step == a.T - 1);
    };
    AffineSums<T> sums = {sum(0), sum(1)};
    const T r_std = load(static_cast<const T*>(a.r_std) + gate_row(gate));
    const Result<dtype> grad_gates(a.grad_gates, gate_row(gate) * a.H),
        operand(a.operand, (int64_t(block_index()) * step_gates + gate) * a.H);
    norm_gradient(x_hat, dy, r_std, affine, block, sums,
                  [&](Column c, T x) { grad_gates(c, x), operand(c, x); });
    sums.store();
  }
};

// The end of the step after, then the gradients of Eq. 13, 14 and 12: da_z, da_h.
template <Dtype dtype>
struct UpdateGateBackward : RowKernel<dtype, GateBackwardArguments> {
  MMIXER_DEVICE static void run(void* shared, const GateBackwardArguments& a) {
    using T = Wide<dtype>;
    using OwnRow = Row<wide<dtype>, false>;
    const GateBackwardRow<dtype> own(a);
    if (a.step + 1 < a.T) {
      const Row<wide<dtype>> d_sum(a.grad_sum, own.state_offset, a.H),
          d_r_h(a.grad_r_h, own.state_offset, a.H);
      const OwnRow carry(a.carry, own.state_offset, a.H);
      const OwnRow before(a.grad_h, own.state_offset, a.H);
      const Result<wide<dtype>> grad_h(a.grad_h, own.state_offset),
          grad_f_tilde(a.grad_f_tilde, own.row(a.step + 1) * a.H);
      const Result<dtype> grad_hx(a.grad_hx, own.state_offset);
      const bool valid = own.valid(a.step + 1), first = a.step < 0;
      each_column(a.H, [&](Column c) {
        grad_f_tilde(c, d_r_h(c) + d_sum(c));
        const T d = valid ? carry(c) + d_sum(c) : before(c);
        grad_h(c, d);
        if (first) grad_hx(c, d);
      });
    }
    if (a.step < 0) return;
    const auto x_hat_z = own.x_hat(step_z), x_hat_h = own.x_hat(step_h), h = own.previous();
    const auto affine_z = own.affine(step_z), affine_h = own.affine(step_h);
    const OwnRow grad_h(a.grad_h, own.state_offset, a.H);
    const bool valid = own.valid(a.step);
    const RunRows output_rows(a.grad_output_stride, own.group, own.sample, a.T, own.reverse);
    const int64_t output = output_rows.first + a.step * output_rows.step + first_column();
    const Held d(a.H, [&](Column c) {
      if (!valid || !c.exists) return T(0);
      return grad_h(c) + load_of<T, dtype>(a.grad_output, output + c.offset);
    });
    const Held z(a.H,
                 [&](Column c) { return Activation<false>::sigmoid(affine_z(c, x_hat_z(c))); });
    const Held h_tilde(a.H,
                       [&](Column c) { return Activation<false>::tanh(affine_h(c, x_hat_h(c))); });
    const Result<wide<dtype>> carry(a.carry, own.state_offset);
    each_column(a.H, [&](Column c) { carry(c, d(c) - d(c) * z(c)); });
    RowBlock<T> block(shared, a.H);
    own.gradient(
        step_z, x_hat_z,
        [&](Column c) { return sigmoid_backward(d(c) * (h_tilde(c) - h(c)), z(c)); }, affine_z,
        block);
    own.gradient(
        step_h, x_hat_h, [&](Column c) { return tanh_backward(d(c) * z(c), h_tilde(c)); }, affine_h,
        block);
  }
};

// The gradient of Eq. 11, da_r, and the part that reaches the state before through r h.
template <Dtype dtype>
struct ResetGateBackward : RowKernel<dtype, GateBackwardArguments> {
  MMIXER_DEVICE static void run(void* shared, const GateBackwardArguments& a) {
    using T = Wide<dtype>;
    const GateBackwardRow<dtype> own(a);
    const auto x_hat = own.x_hat(step_r), h = own.previous();
    const Row<wide<dtype>> d_r_h(a.grad_r_h, own.state_offset, a.H);
    const Row<wide<dtype>, false> before(a.carry, own.state_offset, a.H);
    const auto affine = own.affine(step_r);
    const Held r(a.H, [&](Column c) { return Activation<false>::sigmoid(affine(c, x_hat(c))); });
    const Result<wide<dtype>> carry(a.carry, own.state_offset);
    each_column(a.H, [&](Column c) { carry(c, before(c) + d_r_h(c) * r(c)); });
    RowBlock<T> block(shared, a.H);
    own.gradient(
        step_r, x_hat, [&](Column c) { return sigmoid_backward(d_r_h(c) * h(c), r(c)); }, affine,
        block);
  }
};

}  // namespace mmixer::cuda
