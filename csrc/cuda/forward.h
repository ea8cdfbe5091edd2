// The recurrence of Eq. 11-14 over a whole sequence, in one launch.
//
// A team of C blocks owns 8 samples of one weight set; a block owns H/C rows of W_r, W_z and W_h, kept
// in registers and shared memory (layout.h), and the same rows of the state, in float32. A step is two
// dependent products, r and z then h, and four exchanges: the sum of squares of r's pre-activations,
// the operand r h, the sums of squares of z's and h's, the operand h. There is no mean to exchange:
// the columns of the weights have mean zero over the rows (prepare.h), so pre-activations have it too.
// What bounds a step is the latency of the four exchanges, not the products.
#pragma once

#include <cfloat>

#include "../formulas.h"
#include "activations.h"
#include "exchange.h"
#include "team.h"

namespace mmixer::cuda {

template <class L, class Path>
struct Forward {
  struct Schedule {
    static constexpr int channels = 4;
    static constexpr Channel channel[channels] = {{-1, 0, 1}, {1, 0, 0}, {-1, 1, 2}, {0, 0, 0}};
  };
  enum { channel_statistic_r, channel_r_h, channel_statistics_z_h, channel_h };
  enum { operand_h, operand_r_h };
  using Landing = cuda::Landing<L, 2, gates>;
  using Exchange = typename Path::template Exchange<L, Landing, Schedule>;
  using Arguments = ForwardArguments;

  struct Shared {
    Landing landing;
    Sums<L> sums[2];  // r and h in turn; z
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

    float h[L::per_thread], next[L::per_thread][gates];
    MMIXER_UNROLL
    for (int j = 0; j < L::per_thread; j++)
      h[j] = own.mine[j] && a.hx ? load(a.hx + (int64_t(team.group) * a.B + own.sample[j]) * a.H +
                                        own.row[j])
                                 : 0;
    const float* cursor[L::per_thread];  // into input_gates: a thread's elements of the next step
    MMIXER_UNROLL
    for (int j = 0; j < L::per_thread; j++)
      cursor[j] = a.input_gates +
                  (int64_t(team.group) * a.T * a.B + own.sample[j]) * gates * a.H + own.row[j];
    const auto load_input = [&] {
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++) {
        MMIXER_UNROLL
        for (int gate = 0; gate < gates; gate++)
          next[j][gate] = own.mine[j] ? load(cursor[j] + gate * a.H) : 0;
        cursor[j] += int64_t(a.B) * gates * a.H;
      }
    };
    load_input();
    for (int i = thread_index(); i < L::samples * L::H; i += L::threads) {
      const int row = i % L::H, sample = team.first_sample + i / L::H;
      const bool exists = a.hx && row < a.H && sample < a.B;
      uint16_t term[L::parts];
      split<L>(exists ? load(a.hx + (int64_t(team.group) * a.B + sample) * a.H + row) : 0, term);
      MMIXER_UNROLL
      for (int part = 0; part < L::parts; part++)
        landing.operand[operand_h][part][i / L::H][row] = term[part];
    }
    Exchange exchange(shared.exchange, landing,
                      a.packets + int64_t(team.slot) * Exchange::packets, team.rank);

    const float inverse_size = 1.f / a.H;
    const float eps = a.eps > FLT_MIN ? a.eps : FLT_MIN;  // so that no square is subnormal
    // The square of the standard deviation over the rows of a sample, and 1 over its root.
    const auto square = [&](int gate, const Element<L>& element) {
      return landing.total(gate, element.sample) * inverse_size + eps;
    };
    const auto r_std = [&](float square) {
      return has_norm ? reciprocal_root_of_normal(square) : 1.f;
    };
    using Activation = cuda::Activation<L::approximate>;

    for (int t = 0; t < a.T; t++) {
      float input[L::per_thread][gates];
      memcpy(input, next, sizeof input);
      float a_r[L::per_thread] = {}, a_z[L::per_thread] = {}, a_h[L::per_thread] = {};
      float r_h[L::per_thread] = {};
      if (t > 0) exchange.template receive<channel_h>(t - 1);
      weights.template multiply<gate_r>(landing.source(operand_h), shared.sums[0]);
      block_sync();
      each_element<L>([&](int j, const Element<L>& element) {
        a_r[j] = input[j][gate_r] + shared.sums[0].total(element.sample, element.row);
        exchange.template send_statistics<channel_statistic_r, gate_r>(element, {a_r[j] * a_r[j]}, t);
      });
      weights.template multiply<gate_z>(landing.source(operand_h), shared.sums[1]);  // behind the exchange
      exchange.template receive<channel_statistic_r>(t);
      each_element<L>([&](int j, const Element<L>& element) {
        const float r = Activation::sigmoid(
            norms.apply(gate_r, a_r[j] * r_std(square(gate_r, element))));  // Eq. 11
        r_h[j] = r * h[j];
      });
      exchange.template send_operand<channel_r_h>(r_h, t);
      block_sync();  // of z's products, behind the exchange like z's statistics
      each_element<L>([&](int j, const Element<L>& element) {
        a_z[j] = input[j][gate_z] + shared.sums[1].total(element.sample, element.row);
        exchange.template send_statistics<channel_statistics_z_h, gate_z>(element, {a_z[j] * a_z[j]}, t);
      });
      exchange.template receive<channel_r_h>(t);
      if (t + 1 < a.T) load_input();  // They come while the statistics travel.
      weights.template multiply<gate_h>(landing.source(operand_r_h), shared.sums[0]);
      block_sync();
      each_element<L>([&](int j, const Element<L>& element) {
        a_h[j] = input[j][gate_h] + shared.sums[0].total(element.sample, element.row);
        exchange.template send_statistics<channel_statistics_z_h, gate_h>(element, {a_h[j] * a_h[j]}, t);
      });
      exchange.template receive<channel_statistics_z_h>(t);
      each_element<L>([&](int j, const Element<L>& element) {
        const float square_z = square(gate_z, element), square_h = square(gate_h, element);
        const float x_z = norms.apply(gate_z, a_z[j] * r_std(square_z));
        const float x_h = norms.apply(gate_h, a_h[j] * r_std(square_h));
        const float z = Activation::sigmoid(x_z), h_tilde = Activation::tanh(x_h);  // Eq. 12, 14
        if (t < own.length[j]) h[j] = interpolate(z, h_tilde, h[j]);                // Eq. 13
      });
      if (t + 1 < a.T) exchange.template send_operand<channel_h>(h, t);
      MMIXER_UNROLL
      for (int j = 0; j < L::per_thread; j++)
        if (own.mine[j])
          a.states[((int64_t(team.group) * a.T + t) * a.B + own.sample[j]) * a.H + own.row[j]] =
              h[j];
    }
  }
};

}  // namespace mmixer::cuda
