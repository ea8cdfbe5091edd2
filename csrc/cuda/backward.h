// The gradient of forward.h's recurrence, in one launch.
//
// The team is forward.h's, its weights transposed. A step needs two exchanges only, since
// LayerNorm's gradient is linear in dy, so that its statistics travel beside the data. With
// u = gamma dy,
//   W^T da = r_std (W^T u - mean(u x_hat) V),   V = W^T x_hat, for all steps before (one product);
// the term of mean(u) vanishes, as the columns of W have mean zero. For the same reason da lacks it
// too: the caller takes the mean of each column from dW. u_h and u_z travel first, then u_r; the
// product for z and all that only it needs hide behind the second. What bounds a step is the
// latency of the two exchanges and of the two products that wait for them.
#pragma once

#include <type_traits>

#include "../formulas.h"
#include "activations.h"
#include "dtype.h"
#include "exchange.h"

namespace mmixer::cuda {

template <class L, class Path>
struct Backward {
  // Statistics travel behind the operands in a cluster, and z's behind h's, so that no product
  // waits for what it does not need. Through L2 another channel is another poll, and they ride
  // together. Two operands or statistics from step_z on are z's and h's.
  struct Apart {
    static constexpr int channels = 4;
    static constexpr Channel channel[channels] = {
        Channel().with_operands(step_h, 1),
        Channel().with_operands(step_z, 1).with_statistics(step_z, 2),
        Channel().with_operands(step_r, 1),
        Channel().with_statistics(step_r, 1),
    };
    enum { h, z, r, statistic_r };
  };
  struct Together {
    static constexpr int channels = 2;
    static constexpr Channel channel[channels] = {
        Channel().with_operands(step_z, 2).with_statistics(step_z, 2),
        Channel().with_operands(step_r, 1).with_statistics(step_r, 1),
    };
    enum { h, z = h, r, statistic_r = r };
  };
  static constexpr bool apart = std::is_same_v<Path, ClusterPath>;
  using Schedule = std::conditional_t<apart, Apart, Together>;
  using Landing = cuda::Landing<L, step_gates, step_gates>;
  using Exchange = typename Path::template Exchange<L, Landing, Schedule>;
  using Arguments = BackwardArguments;

  struct Shared {
    Landing landing;
    Sums<L> sums[2];  // h and r in turn; z
    typename Exchange::Shared exchange;
    alignas(16) Word4 weights[L::shared_words ? L::shared_words : 1];
  };
  static constexpr int threads = L::threads;
  static constexpr bool needs_cluster = Exchange::is_cluster;

  // The forward pass's results for a thread's element in one step, and dL/dh of the output.
  struct Step {
    float x_hat[step_gates], v[step_gates], r_std[step_gates], h_previous;
    uint32_t dy;
  };

  // The addresses of the Step that is loaded next, the last one first, and of the gradients that
  // are stored next.
  struct Cursor {
    const float *x_hat, *v, *r_std, *h_previous, *hx;
    const char* dy;
    char* da;
    float* d_f_tilde;
    int64_t step_size, gate_size;       // elements in [B][H] and in [T][B][H]
    int64_t dy_step, da_step, da_gate;  // bytes

    // The cursor begins behind the last step.
    MMIXER_DEVICE Cursor(const Team<L>& team, const Element<L>& own, const Arguments& a) {
      step_size = int64_t(a.B) * a.H, gate_size = a.T * step_size;
      const int size = size_of(a.dtype);
      const RunRows output(a.grad_output_stride, team.group, own.batch_sample, a.T, team.reverse);
      dy_step = size * output.step;
      da_step = size * step_size, da_gate = size * gate_size;
      const int64_t offset = int64_t(own.batch_sample) * a.H + own.gate_row;
      const int64_t gates_end = team.group * step_gates * gate_size + gate_size + offset;
      const int64_t end = team.group * gate_size + gate_size + offset;
      x_hat = a.x_hat + gates_end, v = a.projected + gates_end;
      r_std = a.r_std + (int64_t(team.group) * step_gates + 1) * a.T * a.B + own.batch_sample;
      h_previous = a.states + end - step_size;
      hx = a.hx ? a.hx + team.group * step_size + offset : nullptr;
      dy = static_cast<const char*>(a.grad_output) +
           size * (output.first + a.T * output.step + own.gate_row);
      da = static_cast<char*>(a.grad_gates) + size * (gates_end - step_size);
      d_f_tilde = a.grad_f_tilde + end - step_size;
    }

    MMIXER_DEVICE void move_to(int t, const Arguments& a) {  // from step t + 1
      x_hat -= step_size, v -= step_size, r_std -= a.B, dy -= dy_step;
      h_previous = t > 0 ? h_previous - step_size : hx;
    }

    MMIXER_DEVICE void read(Step& step, const Arguments& a) const {
      MMIXER_UNROLL
      for (int gate = 0; gate < step_gates; gate++) {
        step.x_hat[gate] = load(x_hat + gate * gate_size);
        step.r_std[gate] = load(r_std + gate * (a.T * int64_t(a.B)));
        if (a.norms.p) step.v[gate] = load(v + gate * gate_size);
      }
      step.h_previous = h_previous ? load(h_previous) : 0;
      step.dy = load_bits(dy, a.dtype);
    }

    MMIXER_DEVICE void store_gate(int gate, float x, const Arguments& a) const {
      store_bits(da + gate * da_gate, a.dtype, x);
    }

    MMIXER_DEVICE void store_rest(float da_r, float d_f_tilde_, const Arguments& a) {
      store_gate(step_r, da_r, a);
      *d_f_tilde = d_f_tilde_;
      da -= da_step, d_f_tilde -= step_size;
    }
  };

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    Shared& shared = *static_cast<Shared*>(memory);
    Landing& landing = shared.landing;
    const Team<L> team(a);
    const Element<L> own(team, a);
    const Norms<L> norms(a.norms, a.G, team.group, a.H, own.gate_row);
    Weights<L> weights;
    weights.load(a.weights + int64_t(team.group) * L::terms * step_gates * L::H * L::H,
                 shared.weights, team.rank);

    const int64_t grad_h_n = team.group * a.grad_h_n_stride_group +
                             own.batch_sample * a.grad_h_n_stride_sample + own.gate_row;
    float dh = own.mine ? load_as<float>(a.grad_h_n, a.dtype, grad_h_n) : 0;
    float grad_gamma[step_gates] = {}, grad_beta[step_gates] = {};
    Cursor cursor(team, own, a);
    Step next = {};
    cursor.move_to(a.T - 1, a);
    if (own.mine) cursor.read(next, a);
    cursor.move_to(a.T - 2, a);
    Exchange exchange(shared.exchange, landing,
                      static_cast<typename Exchange::Packet*>(a.packets) +
                          int64_t(team.slot) * Exchange::packets,
                      team.rank);

    const bool has_norm = a.norms.p != nullptr;
    const float inverse_size = 1.f / a.H;
    const auto mean = [&](int gate) {
      const float mean = landing.total(gate, own.sample) * inverse_size;
      return has_norm ? mean : 0.f;
    };
    using Activation = cuda::Activation<L::approximate>;
    float da_r = 0, d_f_tilde = 0;  // the step before's, stored behind the first exchange

    for (int step = 0; step < a.T; step++) {
      const int t = a.T - 1 - step;
      const Step now = next;
      const float(&x_hat)[step_gates] = now.x_hat, (&r_std)[step_gates] = now.r_std;
      const bool valid = own.steps.contain(t);
      const float d = valid ? dh + float_of_bits(now.dy, a.dtype) : 0;
      const float r = Activation::sigmoid(norms.apply(step_r, x_hat[step_r]));
      const float z = Activation::sigmoid(norms.apply(step_z, x_hat[step_z]));
      const float h_tilde = Activation::tanh(norms.apply(step_h, x_hat[step_h]));
      const float dy_z = sigmoid_backward(d * (h_tilde - now.h_previous), z);
      const float dy_h = tanh_backward(d * z, h_tilde);
      const float u_z = dy_z * norms.gamma[step_z], u_h = dy_h * norms.gamma[step_h];
      if (own.exists) {
        exchange.template send_operand<Schedule::h, step_h>(u_h, step);
        exchange.template send_operand<Schedule::z, step_z>(u_z, step);
        exchange.template send_statistics<Schedule::z, step_z>(own,
                                                               {u_z * x_hat[step_z],
                                                                u_h * x_hat[step_h]},
                                                               step);
      }
      // These hide behind the exchange.
      grad_gamma[step_z] += dy_z * x_hat[step_z], grad_beta[step_z] += dy_z;
      grad_gamma[step_h] += dy_h * x_hat[step_h], grad_beta[step_h] += dy_h;
      if (own.mine && step > 0) cursor.store_rest(da_r, d_f_tilde, a);
      exchange.template receive<Schedule::h>(step);
      weights.template multiply<step_h>(landing.source(step_h), shared.sums[0]);
      if constexpr (apart) exchange.template receive<Schedule::z>(step);
      if (own.mine && t > 0) cursor.read(next, a);  // It comes while u_r travels.
      // The others may overwrite u_z and its statistic once they have all that this block sends of
      // r.
      HeldOperand<L> held_u_z;
      if constexpr (!L::every_warp_owns) held_u_z.read(landing.source(step_z));
      block_sync();
      float mean_z = 0, mean_h = 0, d_r_h = 0, dy_r = 0, u_r = 0;
      if (own.exists) {
        mean_h = mean(step_h);
        d_r_h =
            r_std[step_h] * (shared.sums[0].total(own.sample, own.row) - mean_h * now.v[step_h]);
        dy_r = sigmoid_backward(d_r_h * now.h_previous, r);
        u_r = dy_r * norms.gamma[step_r];
        exchange.template send_operand<Schedule::r, step_r>(u_r, step);
        if constexpr (L::every_warp_owns) held_u_z.read(landing.source(step_z));
        mean_z = mean(step_z);
        warp_sync();  // All lanes have read before any of them sends.
        exchange.template send_statistics<Schedule::statistic_r, step_r>(own, {u_r * x_hat[step_r]},
                                                                         step);
      }
      // The product for z and all that uses it hide behind the exchange.
      weights.template multiply<step_z>(held_u_z, shared.sums[1]);
      block_sync();
      float d_sum = 0;
      if (own.exists)
        d_sum =
            r_std[step_z] * (shared.sums[1].total(own.sample, own.row) - mean_z * now.v[step_z]);
      grad_gamma[step_r] += dy_r * x_hat[step_r], grad_beta[step_r] += dy_r;
      if (own.mine) {
        cursor.store_gate(step_z, r_std[step_z] * (u_z - mean_z * x_hat[step_z]), a);
        cursor.store_gate(step_h, r_std[step_h] * (u_h - mean_h * x_hat[step_h]), a);
      }
      const float carry = d - d * z + d_r_h * r + d_sum;
      cursor.move_to(t - 2, a);
      exchange.template receive<Schedule::r>(step);
      weights.template multiply<step_r>(landing.source(step_r), shared.sums[0]);
      if constexpr (apart) exchange.template receive<Schedule::statistic_r>(step);
      block_sync();
      if (own.exists) {
        const float mean_r = mean(step_r);
        const float through_r =
            r_std[step_r] * (shared.sums[0].total(own.sample, own.row) - mean_r * now.v[step_r]);
        if (valid) dh = carry + through_r;
        da_r = r_std[step_r] * (u_r - mean_r * x_hat[step_r]);
        d_f_tilde = d_r_h + (d_sum + through_r);
      }
    }
    if (!own.mine) return;
    cursor.store_rest(da_r, d_f_tilde, a);
    const int64_t hx = (int64_t(team.group) * a.B + own.batch_sample) * a.H + own.gate_row;
    store_bits(element_at(a.grad_hx, a.dtype, hx), a.dtype, dh);
    if (!a.grad_norm) return;
    const int64_t gate_size = int64_t(a.B) * a.H, kind_size = step_gates * gate_size;
    float* const grad_norm = a.grad_norm + int64_t(team.group) * 2 * kind_size +
                             int64_t(own.batch_sample) * a.H + own.gate_row;
    MMIXER_UNROLL
    for (int gate = 0; gate < step_gates; gate++) {
      grad_norm[gate * gate_size] = grad_gamma[gate];
      grad_norm[kind_size + gate * gate_size] = grad_beta[gate];
    }
  }
};

}  // namespace mmixer::cuda
