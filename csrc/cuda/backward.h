// The gradient of forward.h's recurrence, in one launch.
//
// The team of forward.h, its weights transposed. A step needs two exchanges only, since LayerNorm's
// gradient is linear in dy, so that its statistics travel beside the data: with u = gamma dy,
//   W^T da = r_std (W^T u - mean(u x_hat) V),   V = W^T x_hat, for all steps before (one product);
// the term of mean(u) vanishes, as the columns of W have mean zero. For the same reason da lacks it
// too: the caller takes the mean of each column from dW. First u_h and u_z, then u_r; the product for
// z hides behind the second. What bounds a step is the latency of the two exchanges.
#pragma once

#include "../formulas.h"
#include "activations.h"
#include "dtype.h"
#include "exchange.h"
#include "team.h"

namespace mmixer::cuda {

template <class L, class Path>
struct Backward {
  // In a cluster statistics travel behind the operands, so that no product waits for them. Through L2 a
  // channel more is a poll more, and they ride along.
  struct Apart {
    static constexpr int channels = 4;
    static constexpr Channel channel[channels] = {
        {gate_h, 0, 0}, {gate_z, gate_z, 2}, {gate_r, 0, 0}, {-1, gate_r, 1}};
  };
  struct Together {
    static constexpr int channels = 3;
    static constexpr Channel channel[channels] = {
        {gate_h, gate_z, 2}, {gate_z, 0, 0}, {gate_r, gate_r, 1}};
  };
  static constexpr bool apart = std::is_same_v<Path, ClusterPath>;
  using Schedule = std::conditional_t<apart, Apart, Together>;
  enum {
    channel_h,
    channel_z,
    channel_r,
    channel_statistics_z_h = apart ? channel_z : channel_h,
    channel_statistic_r = apart ? channel_r + 1 : channel_r
  };
  using Landing = cuda::Landing<L, gates, gates>;
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

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    Shared& shared = *static_cast<Shared*>(memory);
    Landing& landing = shared.landing;
    const Team<L> team(a);
    const Elements<L> own(team, a);
    const bool has_norm = a.norms != nullptr;

    Weights<L> weights;
    weights.load(a.weights + int64_t(team.group) * L::parts * gates * L::H * L::H, shared.weights,
                 team.rank);
    const Norms<L> norms(a.norms, a.G, team.group, a.H, team.rank * L::rows);

    float dh[L::per_thread];
    float grad_gamma[L::per_thread][gates] = {}, grad_beta[L::per_thread][gates] = {};
    const int64_t step_size = int64_t(a.B) * a.H, gate_size = a.T * step_size;
    const int dy_size = size_of(a.grad_output_dtype), da_size = size_of(a.grad_gates_dtype);
    // A thread's elements: of the step that is loaded next, and of the step that is stored next.
    struct Cursor {
      const float *x_hat, *v, *r_std, *h_previous;
      const char* dy;
      char* da;
      float* d_f_tilde;
    } cursor[L::per_thread];
    MMIXER_UNROLL
    for (int j = 0; j < L::per_thread; j++) {
      const int64_t place = int64_t(own.sample[j]) * a.H + own.row[j];
      const int64_t end = gate_size + place;  // behind the last step
      dh[j] = own.mine[j] ? a.grad_h_n[team.group * step_size + place] : 0;
      cursor[j] = {
          a.x_hat + team.group * gates * gate_size + end,
          a.projected + team.group * gates * gate_size + end,
          a.r_std + (int64_t(team.group) * gates + 1) * a.T * a.B + own.sample[j],
          a.states + team.group * gate_size + end - step_size,
          static_cast<const char*>(a.grad_output) +
              dy_size * (team.group * a.grad_output_stride.group +
                         a.T * a.grad_output_stride.step +
                         own.sample[j] * a.grad_output_stride.sample + own.row[j]),
          static_cast<char*>(a.grad_gates) +
              da_size * (gates * (team.group * gate_size + end - step_size - own.row[j]) +
                         own.row[j]),
          a.grad_f_tilde + team.group * gate_size + end - step_size};
    }

    const auto hx_place = [&](int j) {
      return (int64_t(team.group) * a.B + own.sample[j]) * a.H + own.row[j];
    };

    struct Step {
      float x_hat[gates], v[gates], r_std[gates], h_previous;
      uint32_t dy;
    } next[L::per_thread] = {};
    const auto load_step = [&](int t) {
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        if (!own.mine[j]) continue;
        const Cursor& at = cursor[j];
        Step& step = next[j];
        MMIXER_UNROLL
        for (int gate = 0; gate < gates; gate++) {
          step.x_hat[gate] = load(at.x_hat + gate * gate_size);
          step.r_std[gate] = load(at.r_std + gate * (a.T * int64_t(a.B)));
          if (has_norm) step.v[gate] = load(at.v + gate * gate_size);
        }
        step.h_previous = t > 0 || a.hx ? load(at.h_previous) : 0;
        step.dy = load_bits(at.dy, a.grad_output_dtype);
      }
    };
    const auto move_to = [&](int t) {  // from the step after it
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        Cursor& at = cursor[j];
        at.x_hat -= step_size, at.v -= step_size, at.r_std -= a.B;
        at.dy -= dy_size * a.grad_output_stride.step;
        at.h_previous = t > 0 ? at.h_previous - step_size : a.hx + hx_place(j);
      }
    };
    move_to(a.T - 1);
    load_step(a.T - 1);
    move_to(a.T - 2);
    Exchange exchange(shared.exchange, landing,
                      a.packets + int64_t(team.slot) * Exchange::packets, team.rank);

    const float inverse_size = 1.f / a.H;
    const auto mean = [&](int gate, const Element<L>& element) {
      const float mean = landing.total(gate, element.sample) * inverse_size;
      return has_norm ? mean : 0.f;
    };
    const auto store_gate = [&](int j, int gate, float da) {
      if (own.mine[j])
        store_bits(cursor[j].da + gate * a.H * int64_t(da_size), a.grad_gates_dtype, da);
    };
    // What the end of a step gives is stored behind the first exchange of the next one.
    float da_r[L::per_thread] = {}, d_f_tilde[L::per_thread] = {};
    const auto store_rest = [&] {
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        store_gate(j, gate_r, da_r[j]);
        if (own.mine[j]) *cursor[j].d_f_tilde = d_f_tilde[j];
        cursor[j].da -= da_size * (gates * step_size);
        cursor[j].d_f_tilde -= step_size;
      }
    };
    using Activation = cuda::Activation<L::approximate>;

    for (int step = 0; step < a.T; step++) {
      const int t = a.T - 1 - step;
      Step now[L::per_thread];
      memcpy(now, next, sizeof now);
      float u_h[L::per_thread] = {}, u_z[L::per_thread] = {}, u_r[L::per_thread] = {};
      float r[L::per_thread] = {}, dy_r[L::per_thread] = {}, d_r_h[L::per_thread] = {};
      float mean_z[L::per_thread] = {}, mean_h[L::per_thread] = {};
      float carry[L::per_thread] = {}, d_sum[L::per_thread] = {};
      bool valid[L::per_thread];
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const float(&x)[gates] = now[j].x_hat;
        valid[j] = t < own.length[j];
        const float d = valid[j] ? dh[j] + float_of_bits(now[j].dy, a.grad_output_dtype) : 0;
        const auto y = [&](int gate) { return norms.apply(gate, x[gate]); };
        r[j] = Activation::sigmoid(y(gate_r));
        const float z = Activation::sigmoid(y(gate_z)), h_tilde = Activation::tanh(y(gate_h));
        const float dy_z = sigmoid_backward(d * (h_tilde - now[j].h_previous), z);
        const float dy_h = tanh_backward(d * z, h_tilde);
        grad_gamma[j][gate_z] += dy_z * x[gate_z], grad_beta[j][gate_z] += dy_z;
        grad_gamma[j][gate_h] += dy_h * x[gate_h], grad_beta[j][gate_h] += dy_h;
        u_z[j] = dy_z * norms.gamma[gate_z];
        u_h[j] = dy_h * norms.gamma[gate_h];
        carry[j] = d - d * z;
      }
      exchange.template send_operand<channel_h>(u_h, step);
      exchange.template send_operand<channel_z>(u_z, step);
      each_element<L>([&](int j, const Element<L>& element) {
        exchange.template send_statistics<channel_statistics_z_h, gate_z>(
            element, {u_z[j] * now[j].x_hat[gate_z], u_h[j] * now[j].x_hat[gate_h]}, step);
      });
      if (step > 0) store_rest();
      exchange.template receive<channel_h>(step);
      weights.template multiply<gate_h>(landing.source(gate_h), shared.sums[0]);
      exchange.template receive<channel_z>(step);
      if (t > 0) load_step(t - 1);  // It comes while u_r travels.
      // The others may overwrite u_z and its statistic once they have all that this block sends of r. A
      // warp reads them before it sends, or before a barrier if it has nothing to send.
      HeldOperand<L> held_u_z;
      if constexpr (!L::all_exist) held_u_z.read(landing.source(gate_z));
      block_sync();
      each_element<L>([&](int j, const Element<L>& element) {
        mean_h[j] = mean(gate_h, element);
        d_r_h[j] = now[j].r_std[gate_h] * (shared.sums[0].total(element.sample, element.row) -
                                           mean_h[j] * now[j].v[gate_h]);
        dy_r[j] = sigmoid_backward(d_r_h[j] * now[j].h_previous, r[j]);
        u_r[j] = dy_r[j] * norms.gamma[gate_r];
      });
      exchange.template send_operand<channel_r>(u_r, step);
      if constexpr (L::all_exist) held_u_z.read(landing.source(gate_z));
      each_element<L>([&](int j, const Element<L>& element) {
        mean_z[j] = mean(gate_z, element);
        exchange.template send_statistics<channel_statistic_r, gate_r>(
            element, {u_r[j] * now[j].x_hat[gate_r]}, step);
      });
      // Behind the exchange: the product for z, and what is done with it.
      weights.template multiply<gate_z>(held_u_z, shared.sums[1]);
      block_sync();
      each_element<L>([&](int j, const Element<L>& element) {
        const float(&x)[gates] = now[j].x_hat, (&r_std)[gates] = now[j].r_std;
        grad_gamma[j][gate_r] += dy_r[j] * x[gate_r], grad_beta[j][gate_r] += dy_r[j];
        d_sum[j] = r_std[gate_z] * (shared.sums[1].total(element.sample, element.row) -
                                    mean_z[j] * now[j].v[gate_z]);
        carry[j] += d_r_h[j] * r[j] + d_sum[j];
        store_gate(j, gate_z, r_std[gate_z] * (u_z[j] - mean_z[j] * x[gate_z]));
        store_gate(j, gate_h, r_std[gate_h] * (u_h[j] - mean_h[j] * x[gate_h]));
      });
      move_to(t - 2);
      exchange.template receive<channel_r>(step);
      weights.template multiply<gate_r>(landing.source(gate_r), shared.sums[0]);
      if constexpr (channel_statistic_r != channel_r)
        exchange.template receive<channel_statistic_r>(step);
      block_sync();
      each_element<L>([&](int j, const Element<L>& element) {
        const float mean_r = mean(gate_r, element);
        const float d = now[j].r_std[gate_r] *
                        (shared.sums[0].total(element.sample, element.row) -
                         mean_r * now[j].v[gate_r]);
        if (valid[j]) dh[j] = carry[j] + d;
        da_r[j] = now[j].r_std[gate_r] * (u_r[j] - mean_r * now[j].x_hat[gate_r]);
        d_f_tilde[j] = d_r_h[j] + (d_sum[j] + d);
      });
    }
    store_rest();
    MMIXER_UNROLL
    for (int j = 0; j < L::per_thread; j++) {
      if (!own.mine[j]) continue;
      const int64_t place = int64_t(own.sample[j]) * a.H + own.row[j];
      a.grad_hx[team.group * step_size + place] = dh[j];
      MMIXER_UNROLL
      for (int gate = 0; gate < gates; gate++) {
        if (!has_norm) continue;
        float* grad = a.grad_norm + (int64_t(team.group) * 2 * gates + gate) * step_size + place;
        grad[0] = grad_gamma[j][gate];
        grad[gates * step_size] = grad_beta[j][gate];
      }
    }
  }
};

}  // namespace mmixer::cuda
