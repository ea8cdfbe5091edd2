// The recurrence of Eq. 11-14 over a whole sequence, in one launch.
//
// A team of C blocks owns 4 or 8 samples of one weight set; a block owns H/C rows of W_r, W_z and
// W_h, kept in registers and shared memory (layout.h), and the same rows of the state, in float32.
// A step is two dependent products, r and z then h, and four exchanges: the sum of squares of r's
// pre-activations, the operand r h, the sums of squares of z's and h's, the operand h. There is no
// mean to exchange: the columns of the weights have mean zero over the rows (prepare.h), so
// pre-activations have it too. What z needs is done while r h travels. What bounds a step is the
// latency of the four exchanges, then the LayerNorms between them, not the products.
#pragma once

#include <cfloat>

#include "../formulas.h"
#include "activations.h"
#include "dtype.h"
#include "exchange.h"

namespace mmixer::cuda {

template <class L, class Path>
struct Forward {
  enum { operand_h, operand_r_h };
  struct Schedule {
    static constexpr int channels = 4;
    // Two statistics from step_z on are z's and h's.
    static constexpr Channel channel[channels] = {
        Channel().with_statistics(step_r, 1),
        Channel().with_operands(operand_r_h, 1),
        Channel().with_statistics(step_z, 2),
        Channel().with_operands(operand_h, 1),
    };
  };
  enum { channel_statistic_r, channel_r_h, channel_statistics_z_h, channel_h };
  using Landing = cuda::Landing<L, 2, step_gates>;
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
    const Element<L> own(team, a);
    const Norms<L> norms(a.norms, a.G, team.group, a.H, own.gate_row);
    Weights<L> weights;
    weights.load(a.weights + int64_t(team.group) * L::terms * step_gates * L::H * L::H,
                 shared.weights, team.rank);

    const float* hx = a.hx ? a.hx + int64_t(team.group) * a.B * a.H : nullptr;
    float h = own.mine && hx ? load(hx + int64_t(own.batch_sample) * a.H + own.gate_row) : 0;
    for (int i = thread_index(); i < L::samples * L::H; i += L::threads) {
      const int row = i % L::H, sample = team.first_sample + i / L::H;
      uint16_t terms[L::terms];
      split<L>(hx && row < a.H && sample < a.B ? load(hx + int64_t(sample) * a.H + row) : 0, terms);
      MMIXER_UNROLL
      for (int term = 0; term < L::terms; term++)
        landing.operand[operand_h][term][i / L::H][row] = terms[term];
    }

    // The addresses of this thread's element in the caller's arrays, in the next step.
    const int64_t first_row = int64_t(team.group) * a.T * a.B + own.batch_sample;
    const float* next_input = a.input_gates + first_row * step_gates * a.H + own.gate_row;
    const int64_t first_element = first_row * a.H + own.gate_row;
    using State = Stored<L::state_dtype>;
    const RunRows output(a.output_stride, team.group, own.batch_sample, a.T, team.reverse);
    State* next_output = static_cast<State*>(a.output) + output.first + own.gate_row;
    float* next_state = a.states + first_element;  // nowhere, where states are not kept
    float next[step_gates];
    const auto load_input = [&] {
      MMIXER_UNROLL
      for (int gate = 0; gate < step_gates; gate++)
        next[gate] = own.mine ? load(next_input + gate * a.H) : 0;
      next_input += int64_t(a.B) * step_gates * a.H;
    };
    load_input();
    Exchange exchange(shared.exchange, landing,
                      static_cast<typename Exchange::Packet*>(a.packets) +
                          int64_t(team.slot) * Exchange::packets,
                      team.rank);

    const bool has_norm = a.norms.p != nullptr;
    const float inverse_size = 1.f / a.H;
    const float eps = a.eps > FLT_MIN ? a.eps : FLT_MIN;  // so that no variance is subnormal
    const auto variance = [&](int gate) {
      return landing.total(gate, own.sample) * inverse_size + eps;
    };
    const auto norm = [&](int gate, float x, float variance) {
      return norms.apply(gate, has_norm ? x * reciprocal_root_of_normal(variance) : x);
    };
    using Activation = cuda::Activation<L::approximate>;

    for (int t = 0; t < a.T; t++) {
      float input[step_gates];
      memcpy(input, next, sizeof input);
      float a_r = 0, a_z = 0, a_h = 0;
      if (t > 0) exchange.template receive<channel_h>(t - 1);
      weights.template multiply<step_r>(landing.source(operand_h), shared.sums[0]);
      block_sync();
      if (own.exists) {
        a_r = input[step_r] + shared.sums[0].total(own.sample, own.row);
        exchange.template send_statistics<channel_statistic_r, step_r>(own, {a_r * a_r}, t);
      }
      // This product hides behind the exchange.
      weights.template multiply<step_z>(landing.source(operand_h), shared.sums[1]);
      exchange.template receive<channel_statistic_r>(t);
      if (own.exists) {
        const float r = Activation::sigmoid(norm(step_r, a_r, variance(step_r)));  // Eq. 11
        exchange.template send_operand<channel_r_h, operand_r_h>(r * h, t);
      }
      if (!Exchange::receive_is_barrier) block_sync();  // z's products are all there
      if (own.exists) {
        a_z = input[step_z] + shared.sums[1].total(own.sample, own.row);
        exchange.template send_statistics<channel_statistics_z_h, step_z>(own, {a_z * a_z}, t);
      }
      exchange.template receive<channel_r_h>(t);
      if (t + 1 < a.T) load_input();  // They come while the statistics travel.
      weights.template multiply<step_h>(landing.source(operand_r_h), shared.sums[0]);
      block_sync();
      if (own.exists) {
        a_h = input[step_h] + shared.sums[0].total(own.sample, own.row);
        exchange.template send_statistics<channel_statistics_z_h, step_h>(own, {a_h * a_h}, t);
      }
      exchange.template receive<channel_statistics_z_h>(t);
      if (own.exists) {
        const float variance_z = variance(step_z), variance_h = variance(step_h);
        const float x_z = norm(step_z, a_z, variance_z), x_h = norm(step_h, a_h, variance_h);
        const float z = Activation::sigmoid(x_z), h_tilde = Activation::tanh(x_h);  // Eq. 12, 14
        if (own.steps.contain(t)) h = interpolate(z, h_tilde, h);                   // Eq. 13
        if (t + 1 < a.T) exchange.template send_operand<channel_h, operand_h>(h, t);
      }
      if (own.mine) {
        *next_output = encode<L::state_dtype>(own.steps.contain(t) ? h : 0);
        if (a.states) *next_state = h;
      }
      next_output += output.step;
      next_state += int64_t(a.B) * a.H;
    }
    if (!own.mine) return;
    const int64_t element = (int64_t(team.group) * a.B + own.batch_sample) * a.H + own.gate_row;
    store_of<L::state_dtype>(a.h_n, element, h);
  }
};

}  // namespace mmixer::cuda
