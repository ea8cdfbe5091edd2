// One step of one weight set, the whole unit (Eq. 7-14), in one launch. A team of blocks owns up to 8
// samples, and each of its warps rows of the weights; what a product gives goes to every block of the
// team as packets through L2 (device.h), four times a step: f and g, then s, then r and z, then h. Each
// block computes all norms and gates again, which costs less than to send them. Bound by the latency of
// these exchanges, and by reading the weights once.
//
// A packet's tag is the number of the team's call. It is kept beside the packets: nothing is cleared
// between calls, which a stream runs one after another.
#pragma once

#include "../formulas.h"
#include "activations.h"
#include "dtype.h"

namespace mmixer::cuda {

constexpr int cell_samples = 8;  // of a team at most

// 8-byte words of a team's workspace: its number of calls, and six values of each row and sample.
template <class T>
MMIXER_CONSTANT int64_t cell_workspace(int H) {
  return 1 + int64_t(norm_gates) * cell_samples * H * int64_t(sizeof(T) / sizeof(uint32_t));
}

template <class T, Dtype weight_dtype>
struct Cell {
  using Arguments = CellArguments;
  static constexpr int threads = 256;
  static constexpr bool needs_cluster = false;
  static constexpr int warps = threads / 32;
  static constexpr int words = sizeof(T) / sizeof(uint32_t);
  static constexpr int weight_bytes = weight_dtype == Dtype::float64   ? 8
                                      : weight_dtype == Dtype::float32 ? 4
                                                                       : 2;
  static constexpr int at_once = 16 / weight_bytes;  // weights a load
  static constexpr size_t head_bytes = 16;           // of shared memory, before the samples

  // The tag; per sample a product's operand, [f_bar || g_bar] and f_tilde.
  static MMIXER_CONSTANT size_t shared_bytes(int samples, int F, int C, int H) {
    return head_bytes + size_t(samples) * (size_t(F + C > H ? F + C : H) + 3 * size_t(H)) * sizeof(T);
  }

  static MMIXER_DEVICE void run(void* shared, const Arguments& a) {
    Cell(shared, a).step();
  }

 private:
  MMIXER_DEVICE Cell(void* shared, const Arguments& arguments)
      : a(arguments),
        team(block_index() / a.blocks),
        rank(block_index() % a.blocks),
        first(team * a.team_samples),
        n(a.B - first < a.team_samples ? a.B - first : a.team_samples),
        lane(thread_index() % 32),
        warp(thread_index() / 32),
        packets(a.workspace + team * cell_workspace<T>(a.H)),
        width(a.F + a.C > a.H ? a.F + a.C : a.H),
        shared_tag(static_cast<uint32_t*>(shared)),
        operand(reinterpret_cast<T*>(static_cast<char*>(shared) + head_bytes)),
        pair(operand + int64_t(a.team_samples) * width),
        mixed(pair + int64_t(a.team_samples) * 2 * a.H) {}

  MMIXER_DEVICE void step() {
    const int H = a.H;
    // One thread reads the tag for its block. The tag is renewed once everybody's packets have come,
    // and a block sends its own behind the barrier, which waits for what that thread stores. A load by
    // each thread for itself would have no such end: a barrier does not wait for it, and a warp that
    // has no rows to send could be given the new tag, and wait for packets with it for ever.
    if (thread_index() == 0) *shared_tag = uint32_t(load_packet(packets)) + 1;
    for (int i = thread_index(); i < n * (a.F + a.C); i += threads) {
      const int s = i / (a.F + a.C), column = i % (a.F + a.C);
      operand[s * width + column] =
          column < a.F
              ? load_as<T>(a.input, a.dtype, (first + s) * a.input_stride + column)
              : load_as<T>(a.context, a.dtype, (first + s) * a.context_stride + column - a.F);
    }
    block_sync();
    tag = *shared_tag;
    multiply(norm_f, operand, width, a.F);
    multiply(norm_g, operand + a.F, width, a.C);
    receive<norm_f, 2>(pair, 2 * H);
    if (rank == 0 && thread_index() == 0) store_packet(packets, tag, 0);
    for_rows(2, [&](int s, int which) {
      T* const row = pair + (s * 2 + which) * H;
      const Moments m = moments(row);
      for (int i = lane; i < H; i += 32)
        row[i] = Activation<false>::tanh(affine(norm_f + which, i, (row[i] - m.mean) * m.r_std));
    });
    block_sync();
    multiply(norm_s, pair, 2 * H, 2 * H);
    receive<norm_s, 1>(mixed, H);
    // With Eq. 10 in the place of what it is computed from.
    for_rows(1, [&](int s, int) {
      T* const row = mixed + s * H;
      const Moments m = moments(row);
      for (int i = lane; i < H; i += 32) {
        T x = affine(norm_s, i, (row[i] - m.mean) * m.r_std);
        if (!a.concat)
          x = interpolate(Activation<false>::sigmoid(x), pair[s * 2 * H + i], pair[s * 2 * H + H + i]);
        row[i] = x;
        operand[s * width + i] = x + state(s, i);
      }
    });
    block_sync();
    multiply(norm_r, operand, width, H);
    multiply(norm_z, operand, width, H);
    receive<norm_r, 2>(pair, 2 * H);
    for_rows(2, [&](int s, int which) {
      T* const row = pair + (s * 2 + which) * H;
      const Moments m = moments(row);
      for (int i = lane; i < H; i += 32) {
        const T gate =
            Activation<false>::sigmoid(affine(norm_r + which, i, (row[i] - m.mean) * m.r_std));
        if (which == 0)
          operand[s * width + i] = mixed[s * H + i] + gate * state(s, i);
        else
          row[i] = gate;
      }
    });
    block_sync();
    multiply(norm_h, operand, width, H);
    receive<norm_h, 1>(mixed, H);
    for_rows(1, [&](int s, int) {
      T* const row = mixed + s * H;
      const Moments m = moments(row);
      for (int i = rank * 32 + lane; i < H; i += a.blocks * 32) {
        const T h_tilde = Activation<false>::tanh(affine(norm_h, i, (row[i] - m.mean) * m.r_std));
        const T z = pair[(s * 2 + 1) * H + i];
        store_as(a.output, a.dtype, int64_t(first + s) * H + i,
                 interpolate(z, h_tilde, state(s, i)));
      }
    });
  }

  // This block's rows of a weight times each sample's operand, to everybody.
  MMIXER_DEVICE void multiply(int gate, const T* x, int stride, int K) {
    for (int row = rank * warps + warp; row < a.H; row += a.blocks * warps) {
      T sum[cell_samples] = {};
      const char* const weight =
          static_cast<const char*>(a.weight[gate]) + int64_t(row) * K * weight_bytes;
      const bool whole = (reinterpret_cast<uintptr_t>(weight) | K * weight_bytes) % 16 == 0;
      for (int k = whole ? lane * at_once : K; k < K; k += 32 * at_once) {
        const Word4 loaded = load4(weight + k * weight_bytes);
        MMIXER_UNROLL
        for (int j = 0; j < at_once; j++) add(sum, element(loaded, j), x + k + j, stride);
      }
      for (int k = whole ? K : lane; k < K; k += 32)
        add(sum, load_of<T, weight_dtype>(weight, k), x + k, stride);
      MMIXER_UNROLL
      for (int s = 0; s < cell_samples; s++) {
        if (s >= n) break;
        for (int mask = 16; mask; mask /= 2) sum[s] += shuffle_xor(sum[s], mask);
        uint32_t word[words];
        memcpy(word, &sum[s], sizeof word);
        if (lane < words)
          store_packet(packet(gate, s, row) + lane, word[lane % words], tag);
      }
    }
  }

  MMIXER_DEVICE void add(T (&sum)[cell_samples], T weight, const T* x, int stride) const {
    MMIXER_UNROLL
    for (int s = 0; s < cell_samples; s++)
      if (s < n) sum[s] += weight * x[s * stride];
  }

  static MMIXER_DEVICE T element(const Word4& loaded, int j) {
    if constexpr (weight_dtype == Dtype::float64) {
      double x;
      memcpy(&x, &loaded.word[2 * j], sizeof x);
      return x;
    }
    if constexpr (weight_dtype == Dtype::float32) return as_float(loaded.word[j]);
    const uint16_t half = uint16_t(loaded.word[j / 2] >> 16 * (j % 2));
    return T(weight_dtype == Dtype::bfloat16 ? from_bfloat16(half) : from_float16(half));
  }

  MMIXER_DEVICE uint64_t* packet(int gate, int s, int row) const {
    return packets + 1 + ((int64_t(gate) * cell_samples + s) * a.H + row) * words;
  }

  // Rows of `count` gates of each sample, side by side.
  template <int gate, int count>
  MMIXER_DEVICE void receive(T* target, int stride) {
    for (int i = thread_index(); i < n * count * a.H; i += threads) {
      const int row = i % a.H, which = i / a.H % count, s = i / a.H / count;
      const uint64_t* const source = packet(gate + which, s, row);
      uint32_t word[words];
      for (int j = 0; j < words; j++) {
        uint64_t received = load_packet(source + j);
        while (!packet_ready(received, tag)) received = load_packet(source + j);
        word[j] = uint32_t(received);
      }
      memcpy(&target[s * stride + which * a.H + row], word, sizeof word);
    }
    block_sync();
  }

  struct Moments {
    T mean, r_std;
  };

  // Of a row, by a warp; 0 and 1 without LayerNorm.
  MMIXER_DEVICE Moments moments(const T* row) const {
    if (!a.norm_weight) return {0, 1};
    T mean = 0, square = 0;
    for (int i = lane; i < a.H; i += 32) mean += row[i];
    for (int mask = 16; mask; mask /= 2) mean += shuffle_xor(mean, mask);
    mean /= a.H;
    for (int i = lane; i < a.H; i += 32) square += (row[i] - mean) * (row[i] - mean);
    for (int mask = 16; mask; mask /= 2) square += shuffle_xor(square, mask);
    return {mean, reciprocal_root(square / a.H + T(a.eps))};
  }

  MMIXER_DEVICE T affine(int gate, int i, T x_hat) const {
    if (!a.norm_weight) return x_hat;
    const int64_t place = int64_t(gate) * a.H + i;
    return load_as<T>(a.norm_weight, a.norm_dtype, place) * x_hat +
           load_as<T>(a.norm_bias, a.norm_dtype, place);
  }

  MMIXER_DEVICE T state(int s, int i) const {
    return a.hx ? load_as<T>(a.hx, a.dtype, (first + s) * a.hx_stride + i) : T(0);
  }

  // A warp for each of `count` rows a sample.
  template <class Row>
  MMIXER_DEVICE void for_rows(int count, Row row) const {
    for (int i = warp; i < n * count; i += warps) row(i / count, i % count);
  }

  const Arguments& a;
  const int team, rank, first, n, lane, warp;
  uint64_t* const packets;
  const int width;
  uint32_t* const shared_tag;
  T *const operand, *const pair, *const mixed;
  uint32_t tag = 0;
};

}  // namespace mmixer::cuda
