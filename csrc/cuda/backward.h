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

namespace mmixer::cuda {

template <class L, template <class, class, class> class ExchangeOf>
struct Backward {
  struct Schedule {
    static constexpr int channels = 3;
    static constexpr Channel channel[channels] = {
        {gate_h, gate_z, 2}, {gate_z, 0, 0}, {gate_r, gate_r, 1}};
  };
  enum { channel_h, channel_z, channel_r };
  using Landing = cuda::Landing<L, gates, gates>;
  using Exchange = ExchangeOf<L, Landing, Schedule>;
  using Arguments = BackwardArguments;

  struct Shared {
    Landing landing;
    Sums<L> sums[2];  // h and r in turn; z
    typename Exchange::Shared exchange;
    Norms<L> norms;
    alignas(16) Word4 weights[L::shared_words ? L::shared_words : 1];
  };
  static constexpr int threads = L::threads;
  static constexpr bool needs_cluster = Exchange::is_cluster;

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    Shared& shared = *static_cast<Shared*>(memory);
    Landing& landing = shared.landing;
    const int rank = block_index() % L::C, slot = block_index() / L::C;
    const int tiles = (a.B + L::samples - 1) / L::samples;
    const int group = (a.first_team + slot) / tiles, tile = (a.first_team + slot) % tiles;
    const bool has_norm = a.norms != nullptr;
    const int64_t step_size = int64_t(a.B) * a.H;

    Weights<L> weights;
    weights.load(a.weights + int64_t(group) * L::parts * gates * L::H * L::H, shared.weights, rank);
    shared.norms.load(a.norms, a.G, group, a.H, rank * L::rows);

    float dh[L::per_thread];
    float grad_gamma[L::per_thread][gates], grad_beta[L::per_thread][gates];
    float x_hat[L::per_thread][gates], dy[L::per_thread], h_previous[L::per_thread];
    int row[L::per_thread], sample[L::per_thread], length[L::per_thread];
    bool mine[L::per_thread];
    MMIXER_UNROLL
    for (int j = 0; j < L::per_thread; j++) {
      const Element<L> element(j);
      row[j] = rank * L::rows + element.row, sample[j] = tile * L::samples + element.sample;
      mine[j] = element.exists && row[j] < a.H && sample[j] < a.B;
      length[j] = mine[j] && a.lengths ? int(load(a.lengths + sample[j])) : a.T;
      dh[j] = mine[j] ? a.grad_h_n[(int64_t(group) * a.B + sample[j]) * a.H + row[j]] : 0;
      MMIXER_UNROLL
      for (int gate = 0; gate < gates; gate++) grad_gamma[j][gate] = grad_beta[j][gate] = 0;
    }
    // What the first exchange of a step waits for.
    const auto load_step = [&](int t) {
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const int64_t place = int64_t(sample[j]) * a.H + row[j];
        MMIXER_UNROLL
        for (int gate = 0; gate < gates; gate++)
          x_hat[j][gate] =
              mine[j] ? load(a.x_hat + ((int64_t(group) * gates + gate) * a.T + t) * step_size +
                             place)
                      : 0;
        const float* before = t > 0    ? a.states + (int64_t(group) * a.T + t - 1) * step_size
                              : a.hx ? a.hx + int64_t(group) * step_size
                                     : nullptr;
        h_previous[j] = mine[j] && before ? load(before + place) : 0;
        dy[j] = mine[j] ? load_as<float>(a.grad_output, a.grad_output_dtype,
                                         group * a.grad_output_stride.group +
                                             t * a.grad_output_stride.step +
                                             sample[j] * a.grad_output_stride.sample + row[j])
                        : 0;
      }
    };
    load_step(a.T - 1);
    Exchange exchange(shared.exchange, landing, a.packets + int64_t(slot) * Exchange::packets, rank);

    const auto send = [&](auto channel, int gate, const float(&x)[L::per_thread], int step) {
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        uint16_t term[L::parts];
        split(x[j], term);
        if (!Element<L>(j).exists) continue;
        MMIXER_UNROLL
        for (int part = 0; part < L::parts; part++)
          landing.stage[gate][part][thread_index() + j * L::threads] = term[part];
      }
      exchange.template send_operand<decltype(channel)::value>(step);
    };
    const auto mean = [&](int gate, const Element<L>& element) {
      return has_norm ? landing.total(gate, element.sample) / a.H : 0.f;
    };
    using Activation = cuda::Activation<L::parts == 1>;

    for (int step = 0; step < a.T; step++) {
      const int t = a.T - 1 - step;
      float u_h[L::per_thread] = {}, u_z[L::per_thread] = {}, u_r[L::per_thread] = {};
      float da[L::per_thread][gates] = {}, r[L::per_thread] = {}, d_r_h[L::per_thread] = {};
      float carry[L::per_thread] = {}, mean_z[L::per_thread] = {};
      float v[L::per_thread][gates], r_std[L::per_thread][gates];
      bool valid[L::per_thread];
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        valid[j] = t < length[j];
        const float d = valid[j] ? dh[j] + dy[j] : 0;
        const int own = Element<L>(j).row;
        const auto y = [&](int gate) { return shared.norms.apply(gate, own, x_hat[j][gate]); };
        r[j] = Activation::sigmoid(y(gate_r));
        const float z = Activation::sigmoid(y(gate_z)), h_tilde = Activation::tanh(y(gate_h));
        const float dy_z = sigmoid_backward(d * (h_tilde - h_previous[j]), z);
        const float dy_h = tanh_backward(d * z, h_tilde);
        grad_gamma[j][gate_z] += dy_z * x_hat[j][gate_z], grad_beta[j][gate_z] += dy_z;
        grad_gamma[j][gate_h] += dy_h * x_hat[j][gate_h], grad_beta[j][gate_h] += dy_h;
        u_z[j] = dy_z * shared.norms.gamma[gate_z][own];
        u_h[j] = dy_h * shared.norms.gamma[gate_h][own];
        carry[j] = d - d * z;
      }
      send(Constant<channel_h>(), gate_h, u_h, step);
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const Element<L> element(j);
        if (!element.exists) continue;
        exchange.template send_statistic<channel_h>(gate_h, element, u_h[j] * x_hat[j][gate_h],
                                                    step);
        exchange.template send_statistic<channel_h>(gate_z, element, u_z[j] * x_hat[j][gate_z],
                                                    step);
      }
      send(Constant<channel_z>(), gate_z, u_z, step);
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++)
        MMIXER_UNROLL
        for (int gate = 0; gate < gates; gate++) {
          const int64_t line = (int64_t(group) * gates + gate) * a.T + t;
          r_std[j][gate] = mine[j] ? load(a.r_std + line * a.B + sample[j]) : 0;
          v[j][gate] = mine[j] && has_norm ? load(a.projected + line * step_size +
                                                  int64_t(sample[j]) * a.H + row[j])
                                           : 0;
        }
      exchange.template receive<channel_h>(step);
      weights.template multiply<gate_h>(landing.source(gate_h), shared.sums[0].mine());
      // Before the next exchange, which lets the others overwrite u_z.
      exchange.template receive<channel_z>(step);
      const HeldOperand<L> held_u_z(landing.source(gate_z));
      block_sync();
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const Element<L> element(j);
        if (!element.exists) continue;
        const float mean_h = mean(gate_h, element);
        mean_z[j] = mean(gate_z, element);
        d_r_h[j] = r_std[j][gate_h] * (shared.sums[0].total(element.sample, element.row) -
                                       mean_h * v[j][gate_h]);
        const float dy_r = sigmoid_backward(d_r_h[j] * h_previous[j], r[j]);
        grad_gamma[j][gate_r] += dy_r * x_hat[j][gate_r], grad_beta[j][gate_r] += dy_r;
        u_r[j] = dy_r * shared.norms.gamma[gate_r][element.row];
        carry[j] += d_r_h[j] * r[j];
        da[j][gate_z] = r_std[j][gate_z] * (u_z[j] - mean_z[j] * x_hat[j][gate_z]);
        da[j][gate_h] = r_std[j][gate_h] * (u_h[j] - mean_h * x_hat[j][gate_h]);
      }
      send(Constant<channel_r>(), gate_r, u_r, step);
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const Element<L> element(j);
        if (!element.exists) continue;
        exchange.template send_statistic<channel_r>(gate_r, element, u_r[j] * x_hat[j][gate_r],
                                                    step);
      }
      weights.template multiply<gate_z>(held_u_z, shared.sums[1].mine());  // behind the exchange
      exchange.template receive<channel_r>(step);
      weights.template multiply<gate_r>(landing.source(gate_r), shared.sums[0].mine());
      block_sync();
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const Element<L> element(j);
        if (!element.exists) continue;
        const float mean_r = mean(gate_r, element);
        da[j][gate_r] = r_std[j][gate_r] * (u_r[j] - mean_r * x_hat[j][gate_r]);
        const float d_sum =
            r_std[j][gate_r] * (shared.sums[0].total(element.sample, element.row) -
                                mean_r * v[j][gate_r]) +
            r_std[j][gate_z] * (shared.sums[1].total(element.sample, element.row) -
                                mean_z[j] * v[j][gate_z]);
        if (valid[j]) dh[j] = carry[j] + d_sum;
        if (mine[j]) {
          const int64_t place = (int64_t(group) * a.T + t) * a.B + sample[j];
          a.grad_f_tilde[place * a.H + row[j]] = d_r_h[j] + d_sum;
          MMIXER_UNROLL
          for (int gate = 0; gate < gates; gate++)
            store_as(a.grad_gates, a.grad_gates_dtype, (place * gates + gate) * a.H + row[j],
                     da[j][gate]);
        }
      }
      if (t > 0) load_step(t - 1);
    }
    MMIXER_UNROLL
    for (int j = 0; j < L::per_thread; j++) {
      if (!mine[j]) continue;
      const int64_t place = int64_t(sample[j]) * a.H + row[j];
      a.grad_hx[int64_t(group) * step_size + place] = dh[j];
      MMIXER_UNROLL
      for (int gate = 0; gate < gates; gate++) {
        if (!has_norm) continue;
        a.grad_norm[((int64_t(group) * 2 + 0) * gates + gate) * step_size + place] =
            grad_gamma[j][gate];
        a.grad_norm[((int64_t(group) * 2 + 1) * gates + gate) * step_size + place] =
            grad_beta[j][gate];
      }
    }
  }
};

}  // namespace mmixer::cuda
