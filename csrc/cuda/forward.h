// The recurrence of Eq. 11-14 over a whole sequence, in one launch.
//
// A team of C blocks owns 8 samples of one weight set; a block owns H/C rows of W_r, W_z and W_h, kept
// in registers and shared memory (layout.h), and the same rows of the state, in float32. A step is two
// dependent products, r and z then h, and four exchanges: the sum of squares of r's pre-activations,
// the operand r h, the sums of squares of z's and h's, the operand h. There is no mean to exchange:
// the columns of the weights have mean zero over the rows (prepare.h), so pre-activations have it too.
// What bounds a step is the latency of the four exchanges, not the products.
#pragma once

#include "../formulas.h"
#include "activations.h"
#include "exchange.h"

namespace mmixer::cuda {

template <class L, template <class, class, class> class ExchangeOf>
struct Forward {
  struct Schedule {
    static constexpr int channels = 4;
    static constexpr Channel channel[channels] = {{-1, 0, 1}, {1, 0, 0}, {-1, 1, 2}, {0, 0, 0}};
  };
  enum { channel_statistic_r, channel_r_h, channel_statistics_z_h, channel_h };
  enum { operand_h, operand_r_h };
  using Landing = cuda::Landing<L, 2, gates>;
  using Exchange = ExchangeOf<L, Landing, Schedule>;
  using Arguments = ForwardArguments;

  struct Shared {
    Landing landing;
    Sums<L> sums[2];  // r and h in turn; z
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

    Weights<L> weights;
    weights.load(a.weights + int64_t(group) * L::parts * gates * L::H * L::H, shared.weights, rank);
    shared.norms.load(a.norms, a.G, group, a.H, rank * L::rows);

    float h[L::per_thread], input[L::per_thread][gates];
    int row[L::per_thread], sample[L::per_thread], length[L::per_thread];
    bool mine[L::per_thread];  // neither padding of the samples nor of the rows
    MMIXER_UNROLL
    for (int j = 0; j < L::per_thread; j++) {
      const Element<L> element(j);
      row[j] = rank * L::rows + element.row, sample[j] = tile * L::samples + element.sample;
      mine[j] = element.exists && row[j] < a.H && sample[j] < a.B;
      length[j] = mine[j] && a.lengths ? int(load(a.lengths + sample[j])) : a.T;
      h[j] = mine[j] && a.hx
                 ? load(a.hx + (int64_t(group) * a.B + sample[j]) * a.H + row[j])
                 : 0;
    }
    const auto load_input = [&](int t) {
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const int64_t place = (int64_t(group) * a.T + t) * a.B + sample[j];
        MMIXER_UNROLL
        for (int gate = 0; gate < gates; gate++)
          input[j][gate] =
              mine[j] ? load(a.input_gates + (place * gates + gate) * a.H + row[j]) : 0;
      }
    };
    load_input(0);
    for (int i = thread_index(); i < L::samples * L::H; i += L::threads) {
      const int row = i % L::H, sample = tile * L::samples + i / L::H;
      const bool exists = a.hx && row < a.H && sample < a.B;
      uint16_t term[L::parts];
      split(exists ? load(a.hx + (int64_t(group) * a.B + sample) * a.H + row) : 0, term);
      MMIXER_UNROLL
      for (int part = 0; part < L::parts; part++)
        landing.operand[operand_h][part][i / L::H][row] = term[part];
    }
    Exchange exchange(shared.exchange, landing, a.packets + int64_t(slot) * Exchange::packets, rank);

    const auto send = [&](auto channel, int which, const float(&x)[L::per_thread], int t) {
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        uint16_t term[L::parts];
        split(x[j], term);
        if (!Element<L>(j).exists) continue;
        MMIXER_UNROLL
        for (int part = 0; part < L::parts; part++)
          landing.stage[which][part][thread_index() + j * L::threads] = term[part];
      }
      exchange.template send_operand<decltype(channel)::value>(t);
    };
    const auto norm = [&](int gate, const Element<L>& element, float x) {
      if (has_norm) x *= reciprocal_root(landing.total(gate, element.sample) / a.H + a.eps);
      return shared.norms.apply(gate, element.row, x);
    };
    using Activation = cuda::Activation<L::parts == 1>;

    for (int t = 0; t < a.T; t++) {
      float a_r[L::per_thread] = {}, a_z[L::per_thread] = {}, a_h[L::per_thread] = {};
      float r_h[L::per_thread] = {};
      if (t > 0) exchange.template receive<channel_h>(t - 1);
      weights.template multiply<gate_r>(landing.source(operand_h), shared.sums[0].mine());
      block_sync();
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const Element<L> element(j);
        if (!element.exists) continue;
        a_r[j] = input[j][gate_r] + shared.sums[0].total(element.sample, element.row);
        exchange.template send_statistic<channel_statistic_r>(gate_r, element, a_r[j] * a_r[j], t);
      }
      weights.template multiply<gate_z>(landing.source(operand_h), shared.sums[1].mine());  // behind the exchange
      exchange.template receive<channel_statistic_r>(t);
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const Element<L> element(j);
        if (!element.exists) continue;
        const float r = Activation::sigmoid(norm(gate_r, element, a_r[j]));  // Eq. 11
        r_h[j] = r * h[j];
      }
      send(Constant<channel_r_h>(), operand_r_h, r_h, t);
      exchange.template receive<channel_r_h>(t);
      weights.template multiply<gate_h>(landing.source(operand_r_h), shared.sums[0].mine());
      block_sync();
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const Element<L> element(j);
        if (!element.exists) continue;
        a_z[j] = input[j][gate_z] + shared.sums[1].total(element.sample, element.row);
        a_h[j] = input[j][gate_h] + shared.sums[0].total(element.sample, element.row);
        exchange.template send_statistic<channel_statistics_z_h>(gate_z, element, a_z[j] * a_z[j],
                                                                 t);
        exchange.template send_statistic<channel_statistics_z_h>(gate_h, element, a_h[j] * a_h[j],
                                                                 t);
      }
      if (t + 1 < a.T) load_input(t + 1);
      exchange.template receive<channel_statistics_z_h>(t);
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        const Element<L> element(j);
        if (!element.exists) continue;
        const float z = Activation::sigmoid(norm(gate_z, element, a_z[j]));   // Eq. 12
        const float h_tilde = Activation::tanh(norm(gate_h, element, a_h[j]));  // Eq. 14
        if (t < length[j]) h[j] = interpolate(z, h_tilde, h[j]);                // Eq. 13
      }
      if (t + 1 < a.T) send(Constant<channel_h>(), operand_h, h, t);
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++)
        if (mine[j])
          a.states[((int64_t(group) * a.T + t) * a.B + sample[j]) * a.H + row[j]] = h[j];
    }
  }
};

}  // namespace mmixer::cuda
