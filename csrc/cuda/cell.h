// One step of one weight set, the whole unit (Eq. 7-14), in one launch. A team of blocks owns up to
// 8 samples, and each of its warps rows of the weights; what a product gives goes to every block of
// the team as packets through L2 (device.h): f and g, then s, then r, then z and h. Each block
// computes all norms and gates again, which costs less than to send them; only z and the new state,
// at the end, are shared out by columns. The latency of the four exchanges bounds it; the weights
// of a product are requested before the wait in front of it. Without context f takes the place of
// s, and there are three exchanges.
//
// A packet's tag is the number of the team's call. It is kept beside the packets: nothing is
// cleared between calls, which a stream runs one after another.
#pragma once

#include <type_traits>

#include "../formulas.h"
#include "activations.h"
#include "dtype.h"

namespace mmixer::cuda {

constexpr int cell_samples = 8;  // per team at most

// A team's workspace in 8-byte words: its number of calls, and six values per row and sample.
template <class T>
MMIXER_CONSTANT int64_t cell_workspace(int H) {
  return 1 + int64_t(gates) * cell_samples * H * int64_t(sizeof(T) / sizeof(uint32_t));
}

template <class T, Dtype weight_dtype>
struct Cell {
  using Arguments = CellArguments;
  static constexpr int threads = 256;
  static constexpr bool needs_cluster = false;
  static constexpr int warps = threads / 32;
  static constexpr int words = sizeof(T) / sizeof(uint32_t);
  static constexpr int weight_bytes = sizeof(Stored<weight_dtype>);
  // The columns of a product that a lane takes at a time. Lanes read the operand in 16 bytes beside
  // their neighbours' 16, whatever the weights' type: each quarter of a warp meets all 32 banks
  // once.
  static constexpr int columns = 16 / sizeof(T);
  using Weights = std::conditional_t<columns * weight_bytes == 8, Word2, Word4>;
  static constexpr int ahead = 8;  // loads of weights in flight

  struct Moments {
    T mean, r_std;
  };

  struct alignas(16) Head {
    Moments moments[2 * cell_samples];
    uint32_t tag;
  };

  static MMIXER_CONSTANT int whole(int K) { return (K + columns - 1) / columns * columns; }

  static MMIXER_CONSTANT int width(int F, int C, int H) {
    return whole(F) + whole(C) > whole(H) ? whole(F) + whole(C) : whole(H);
  }

  // Shared memory holds a product's operand, [f_bar || g_bar], f_tilde and the state per sample,
  // and LayerNorm's parameters.
  static MMIXER_CONSTANT size_t shared_bytes(int samples, int F, int C, int H) {
    const size_t values =
        samples * (size_t(width(F, C, H)) + 4 * size_t(H)) + 2 * norm_rows(C > 0) * size_t(H);
    return sizeof(Head) + values * sizeof(T);
  }

  static MMIXER_DEVICE void run(void* shared, const Arguments& a) { Cell(shared, a).step(); }

 private:
  // A weight [H][K], and a product's other operand: a row of shared memory per sample.
  struct Factor {
    const void* weight;
    const T* x;
    int stride, K;
  };

  MMIXER_DEVICE Cell(void* shared, const Arguments& arguments)
      : a(arguments),
        team(block_index() / a.blocks),
        rank(block_index() % a.blocks),
        first(team * a.team_samples),
        n(a.B - first < a.team_samples ? a.B - first : a.team_samples),
        lane(thread_index() % 32),
        warp(thread_index() / 32),
        per_column(T(1) / T(a.H)),
        packets(a.workspace + team * cell_workspace<T>(a.H)),
        stride(width(a.F, a.C, a.H)),
        head(*static_cast<Head*>(shared)),
        operand(reinterpret_cast<T*>(&head + 1)),
        pair(operand + int64_t(a.team_samples) * stride),
        mixed(pair + int64_t(a.team_samples) * 2 * a.H),
        state(mixed + int64_t(a.team_samples) * a.H),
        scale(state + int64_t(a.team_samples) * a.H),
        shift(scale + norm_rows(a.C > 0) * int64_t(a.H)) {}

  MMIXER_DEVICE void step() {
    const int H = a.H;
    const bool has_context = a.C > 0;
    const Factor of_input[] = {{a.weight[gate_f], operand, stride, a.F},
                               {a.weight[gate_g], operand + whole(a.F), stride, a.C}};
    const Factor of_pair = {a.weight[gate_s], pair, 2 * H, 2 * H};
    const Factor of_mixed[] = {has_context ? of_pair : of_input[0]};
    const Factor of_sum[] = {{a.weight[gate_r], operand, stride, H},
                             {a.weight[gate_z], operand, stride, H}};
    const Factor of_reset[] = {{a.weight[gate_h], operand, stride, H}};

    if (has_context)
      load_weights(of_input, rank * warps + warp, 0);
    else
      load_weights(of_mixed, rank * warps + warp, 0);
    for (int i = warp; i < 3 * n; i += warps) {
      const int s = i / 3, part = i % 3;
      const void* const source = part == 0 ? a.input : part == 1 ? a.context : a.hx;
      const int64_t source_stride = part == 0   ? a.input_stride
                                    : part == 1 ? a.context_stride
                                                : a.hx_stride;
      T* const target = part == 2 ? state + s * H : operand + s * stride + part * whole(a.F);
      copy<32>(target, source, a.dtype, (first + s) * source_stride,
               part == 0   ? a.F
               : part == 1 ? a.C
                           : H);
    }
    // One thread reads the tag for its block. The tag is renewed once everybody's packets have
    // come, and a block sends its own behind the barrier, which waits for what that thread stores.
    // A load by each thread for itself would have no such end: a barrier does not wait for it, and
    // a warp that has no rows to send could be given the new tag, and wait for packets with it for
    // ever.
    if (thread_index() == threads - 32) head.tag = uint32_t(load_packet(packets)) + 1;
    block_sync();
    tag = head.tag;

    if (has_context) {
      multiply(of_input, gate_f);
      load_weights(of_mixed, rank * warps + warp, 0);
      copy_norms();
      receive<gate_f, 2>(pair);
      renew_tag();
      find_moments(pair, 2);
      for (int i = thread_index(); i < H; i += threads)
        for (int s = 0; s < n; s++) {
          T* const f = pair + s * 2 * H + i;
          const T f_bar = Activation<false>::tanh(normalized(gate_f, 2 * s, i, f[0]));
          const T g_bar = Activation<false>::tanh(normalized(gate_g, 2 * s + 1, i, f[H]));
          f[0] = f_bar, f[H] = g_bar;
        }
      block_sync();
    }

    multiply(of_mixed, gate_s);
    load_weights(of_sum, rank * warps + warp, 0);
    if (!has_context) copy_norms();
    receive<gate_s, 1>(mixed);
    if (!has_context) renew_tag();
    find_moments(mixed, 1);
    // The result of Eq. 10, or of Eq. 7, takes the place of the product.
    for (int i = thread_index(); i < H; i += threads)
      for (int s = 0; s < n; s++) {
        T x = normalized(has_context ? gate_s : gate_f, s, i, mixed[s * H + i]);
        if (!has_context)
          x = Activation<false>::tanh(x);
        else if (a.mix == mmixer::Mix::gated)
          x = interpolate(Activation<false>::sigmoid(x), pair[s * 2 * H + i],
                          pair[s * 2 * H + H + i]);
        mixed[s * H + i] = x;
        operand[s * stride + i] = x + state[s * H + i];
      }
    block_sync();

    multiply<true>(of_sum, gate_r);
    load_weights(of_reset, rank * warps + warp, 0);
    receive<gate_r, 1>(pair);
    find_moments(pair, 1);
    for (int i = thread_index(); i < H; i += threads)
      for (int s = 0; s < n; s++) {
        const T r = Activation<false>::sigmoid(normalized(gate_r, s, i, pair[s * H + i]));
        operand[s * stride + i] = mixed[s * H + i] + r * state[s * H + i];
      }
    block_sync();

    multiply(of_reset, gate_h);
    if (rank * 32 >= H) return;  // without columns of the new state
    receive<gate_z, 2>(pair);
    find_moments(pair, 2);
    for (int s = warp; s < n; s += warps)
      for (int i = rank * 32 + lane; i < H; i += a.blocks * 32) {
        const T* const z_row = pair + s * 2 * H + i;
        const T z = Activation<false>::sigmoid(normalized(gate_z, 2 * s, i, z_row[0]));
        const T h_tilde = Activation<false>::tanh(normalized(gate_h, 2 * s + 1, i, z_row[H]));
        store_as(a.next_state, a.dtype, int64_t(first + s) * H + i,
                 interpolate(z, h_tilde, state[s * H + i]));
      }
  }

  // LayerNorm's parameters are copied while packets travel.
  MMIXER_DEVICE void copy_norms() const {
    if (!a.norm_weight) return;
    const bool is_scale = thread_index() < threads / 2;
    copy<threads / 2>(is_scale ? scale : shift, is_scale ? a.norm_weight : a.norm_bias,
                      a.norm_dtype, 0, norm_rows(a.C > 0) * a.H);
  }

  // Everybody's packets of the first product have come.
  MMIXER_DEVICE void renew_tag() const {
    if (rank == 0 && thread_index() == 0) store_packet(packets, tag, 0);
  }

  // Copies `count` contiguous elements to shared memory, by `members` threads; null means zeros.
  template <int members>
  MMIXER_DEVICE void copy(T* target, const void* source, Dtype dtype, int64_t start,
                          int count) const {
    switch (dtype) {
      case Dtype::float32: copy_of<members, Dtype::float32>(target, source, start, count); break;
      case Dtype::float64: copy_of<members, Dtype::float64>(target, source, start, count); break;
      case Dtype::bfloat16: copy_of<members, Dtype::bfloat16>(target, source, start, count); break;
      default: copy_of<members, Dtype::float16>(target, source, start, count);
    }
  }

  template <int members, Dtype dtype>
  static MMIXER_DEVICE void copy_of(T* target, const void* source, int64_t start, int count) {
    constexpr int at_once = 24;  // loads in flight: all of LayerNorm's parameters up to H = 512
    const auto* const elements = static_cast<const Stored<dtype>*>(source) + start;
    for (int i = thread_index() % members; i < count; i += at_once * members) {
      Stored<dtype> x[at_once] = {};
      MMIXER_UNROLL
      for (int j = 0; j < at_once; j++)
        if (source && i + j * members < count) x[j] = load(elements + i + j * members);
      MMIXER_UNROLL
      for (int j = 0; j < at_once; j++)
        if (i + j * members < count) target[i + j * members] = decode<T, dtype>(x[j]);
    }
  }

  // The number of columns that loads of `Weights` reach; 0 where the rows are not aligned for them.
  MMIXER_DEVICE int loaded_columns(const Factor& f) const {
    const auto address = reinterpret_cast<uintptr_t>(f.weight);
    return (address | f.K * weight_bytes) % sizeof(Weights) == 0 ? f.K : 0;
  }

  // Loads a row's next columns from k0 on, as many per factor. Zeros lie beyond the last.
  template <int count>
  MMIXER_DEVICE void load_weights(const Factor (&f)[count], int row, int k0) {
    if (row >= a.H) return;
    MMIXER_UNROLL
    for (int i = 0; i < ahead; i++) {
      const Factor& factor = f[i % count];
      const int k = k0 + lane * columns, further = i / count * 32 * columns;
      const char* const source =
          static_cast<const char*>(factor.weight) + (int64_t(row) * factor.K + k) * weight_bytes;
      weights[i] = {};
      if (k + further >= loaded_columns(factor)) continue;
      if constexpr (sizeof(Weights) == 8)
        weights[i] = load2(source + further * weight_bytes);
      else
        weights[i] = load4(source + further * weight_bytes);
    }
  }

  // Sends this block's rows of weights times each sample's operands to every block, as the
  // consecutive gates from `gate` on. load_weights has begun the first of a warp's rows.
  template <bool one_operand = false, int count>
  MMIXER_DEVICE void multiply(const Factor (&f)[count], int gate) {
    constexpr int sums = count * cell_samples;
    int most = 0;
    for (const Factor& factor : f)
      if (loaded_columns(factor) > most) most = loaded_columns(factor);
    for (int row = rank * warps + warp; row < a.H; row += a.blocks * warps) {
      T sum[sums] = {};
      for (int k0 = 0; k0 < most; k0 += ahead / count * 32 * columns) {
        if (k0 > 0 || row >= a.blocks * warps) load_weights(f, row, k0);
        MMIXER_UNROLL
        for (int s = 0; s < cell_samples; s++) {
          if (s >= n) break;
          T x[columns];
          MMIXER_UNROLL
          for (int i = 0; i < ahead; i++) {
            if (!one_operand || i % count == 0) {
              const Factor& factor = f[i % count];
              const int k = k0 + lane * columns, further = i / count * 32 * columns;
              const T* const source = factor.x + s * factor.stride + k;
              Word4 loaded = {};
              if (k + further < (one_operand ? most : loaded_columns(factor)))
                loaded = load4(source + further);
              memcpy(x, &loaded, sizeof x);
            }
            MMIXER_UNROLL
            for (int j = 0; j < columns; j++)
              sum[i % count * cell_samples + s] += element(weights[i], j) * x[j];
          }
        }
      }
      MMIXER_UNROLL
      for (int which = 0; which < count; which++) {
        const Factor& factor = f[which];
        for (int k = loaded_columns(factor) + lane; k < factor.K; k += 32) {
          const T weight = load_of<T, weight_dtype>(factor.weight, int64_t(row) * factor.K + k);
          MMIXER_UNROLL
          for (int s = 0; s < cell_samples; s++)
            if (s < n) sum[which * cell_samples + s] += weight * factor.x[s * factor.stride + k];
        }
      }
      const T total = sum_of_each(sum);
      constexpr int holders = 32 / sums;  // lanes that hold the same sum
      const int number = lane / holders, s = number % cell_samples, word = lane % holders;
      uint32_t bits[words];
      memcpy(bits, &total, sizeof bits);
      if (s < n && word < words)
        store_packet(packet(gate + number / cell_samples, s, row) + word,
                     word == 0 ? bits[0] : bits[words - 1], tag);
    }
  }

  // Sums each x[i] over the warp; lane l is given the sum of x[l / (32 / count)].
  template <int count, int half = count / 2>
  MMIXER_DEVICE T sum_of_each(T (&x)[count]) const {
    constexpr int mask = 32 * half / count;
    const bool upper = lane & mask;
    MMIXER_UNROLL
    for (int i = 0; i < half; i++) {
      const T low = x[i], high = x[half + i];
      x[i] = (upper ? high : low) + shuffle_xor(upper ? low : high, mask);
    }
    if constexpr (half > 1) {
      return sum_of_each<count, half / 2>(x);
    } else {
      for (int rest = mask / 2; rest; rest /= 2) x[0] += shuffle_xor(x[0], rest);
      return x[0];
    }
  }

  static MMIXER_DEVICE T element(const Weights& loaded, int j) {
    Stored<weight_dtype> x;
    memcpy(&x, reinterpret_cast<const char*>(&loaded) + j * sizeof x, sizeof x);
    return decode<T, weight_dtype>(x);
  }

  // The address of a value's packets. Gates that are received together lie as they land: f and g,
  // and z and h, of a sample side by side.
  MMIXER_DEVICE uint64_t* packet(int gate, int s, int row) const {
    const bool paired = gate <= gate_g || gate >= gate_z;
    const int64_t start = int64_t(paired ? gate / 2 * 2 : gate) * cell_samples * a.H;
    return packets + 1 + (start + int64_t(paired ? s * 2 + gate % 2 : s) * a.H + row) * words;
  }

  // Receives [n][count][H] of the gates from `gate` on.
  template <int gate, int count>
  MMIXER_DEVICE void receive(T* target) {
    constexpr int at_once = 8;  // loads in flight
    const int all = n * count * a.H * words;
    const uint64_t* const source = packet(gate, 0, 0);
    for (int i = thread_index(); i < all; i += at_once * threads) {
      uint64_t received[at_once];
      MMIXER_UNROLL
      for (int j = 0; j < at_once; j++)
        received[j] = uint64_t(i + j * threads < all ? ~tag : tag)
                      << 32;  // to come, or beyond the last
      // Each round asks at once for all packets that have not come.
      for (bool waits = true; waits;) {
        waits = false;
        MMIXER_UNROLL
        for (int j = 0; j < at_once; j++) {
          if (packet_ready(received[j], tag)) continue;
          received[j] = load_packet(source + i + j * threads);
          waits = true;
        }
      }
      MMIXER_UNROLL
      for (int j = 0; j < at_once; j++) {
        const uint32_t word = uint32_t(received[j]);
        if (i + j * threads < all)
          memcpy(reinterpret_cast<uint32_t*>(target) + i + j * threads, &word, sizeof word);
      }
    }
    block_sync();
  }

  // The moments of `count` rows per sample; a warp takes a row at a time.
  MMIXER_DEVICE void find_moments(const T* rows, int count) {
    if (!a.norm_weight) return;
    for (int i = warp; i < n * count; i += warps) {
      const T* const row = rows + i * a.H;
      const T mean = sum_columns([&](int column) { return row[column]; }) * per_column;
      const T variance =
          sum_columns([&](int column) { return (row[column] - mean) * (row[column] - mean); }) *
          per_column;
      if (lane == 0) head.moments[i] = {mean, reciprocal_root(variance + T(a.eps))};
    }
    block_sync();
  }

  template <class Term>
  MMIXER_DEVICE T sum_columns(Term term) const {
    constexpr int at_once = 16;
    T sum = 0;
    for (int i = lane; i < a.H; i += at_once * 32) {
      T part[4] = {};
      MMIXER_UNROLL
      for (int j = 0; j < at_once; j++)
        if (i + j * 32 < a.H) part[j % 4] += term(i + j * 32);
      sum += (part[0] + part[1]) + (part[2] + part[3]);
    }
    return warp_sum(sum);
  }

  MMIXER_DEVICE T normalized(int gate, int row, int i, T x) const {
    if (!a.norm_weight) return x;
    const Moments m = head.moments[row];
    const int at = norm_row(gate, a.C > 0) * a.H + i;
    return scale[at] * ((x - m.mean) * m.r_std) + shift[at];
  }

  const Arguments& a;
  const int team, rank, first, n, lane, warp;
  const T per_column;
  uint64_t* const packets;
  const int stride;
  Head& head;
  T *const operand, *const pair, *const mixed, *const state, *const scale, *const shift;
  uint32_t tag = 0;
  Weights weights[ahead];
};

}  // namespace mmixer::cuda
