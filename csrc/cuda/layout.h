// How a team of blocks shares the recurrent weights of one weight set, so that they stay on the chip
// for a whole sequence: block c of C keeps rows c H/C ... (c + 1) H/C of W_r, W_z and W_h, each of its
// warps a share of the columns; a team advances 8 samples, the width of one tensor-core product.
//
// A float is a sum of `parts` bfloat16 terms, and a product keeps the terms whose orders sum to less
// than parts: 1 is bfloat16, 2 has relative error 2^-16, 3 has float32's.
#pragma once

#include "arguments.h"
#include "device.h"

namespace mmixer::cuda {

constexpr int greatest_common_divisor(int a, int b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

// H: the hidden size, padded. resident: row tiles (of 16 rows) whose weights lie in registers; the
// rest lies in shared memory.
template <int H_, int C_, int warps_, int parts_, int resident_>
struct Layout {
  static constexpr int H = H_, C = C_, warps = warps_, parts = parts_, resident = resident_;
  static constexpr int threads = 32 * warps;
  static constexpr int samples = 8;
  static constexpr int rows = H / C;
  static constexpr int row_tiles = rows / 16;
  static constexpr int k_blocks = H / 32 / warps;  // of 32 columns
  static constexpr int tiles = parts * gates * row_tiles;
  static constexpr int tile_words = k_blocks * 2 * threads;  // Word4
  static constexpr int shared_words = (tiles - resident) * tile_words;
  // The elements (sample, row) of a gate that a block owns, and a thread's share of them.
  static constexpr int elements = samples * rows;
  static constexpr int per_thread = (elements + threads - 1) / threads;
  // Neighbouring lanes that hold rows of one sample, and the sums a sample that a team makes of them.
  static constexpr int lanes = greatest_common_divisor(rows, 32);
  static constexpr int sums = C * rows / lanes;
  // Of a sample in shared memory: 64 bytes more than a multiple of 128, against bank conflicts.
  static constexpr int stride = H + 32;

  static_assert(H % C == 0 && rows % 16 == 0 && H % (32 * warps) == 0);
  static_assert(0 <= resident && resident <= tiles && sums % 4 == 0);
};

// An operand, [parts][samples][stride] in shared memory. A lane's share of 32 columns is one 16-byte
// load: columns are permuted inside the 32, in the weights alike.
template <class L>
struct SharedOperand {
  const uint16_t* x;

  MMIXER_DEVICE Word4 operator()(int part, int k) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    return load4(x + (part * L::samples + lane / 4) * L::stride +
                 (warp * L::k_blocks + k) * 32 + 8 * (lane % 4));
  }
};

// The same, read before somebody overwrites it.
template <class L>
struct HeldOperand {
  Word4 word[L::parts][L::k_blocks];

  MMIXER_DEVICE explicit HeldOperand(const SharedOperand<L>& source) {
    MMIXER_UNROLL
    for (int part = 0; part < L::parts; part++)
      MMIXER_UNROLL
      for (int k = 0; k < L::k_blocks; k++) word[part][k] = source(part, k);
  }

  MMIXER_DEVICE Word4 operator()(int part, int k) const { return word[part][k]; }
};

template <class L>
class Weights {
 public:
  // matrices: [parts][gates][H][H], row-major; shared: L::shared_words.
  MMIXER_DEVICE void load(const uint16_t* matrices, Word4* shared, int rank) {
    shared_ = shared;
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    MMIXER_UNROLL
    for (int tile = 0; tile < L::tiles; tile++)
      MMIXER_UNROLL
      for (int k = 0; k < L::k_blocks; k++) {
        const int row = rank * L::rows + tile % L::row_tiles * 16 + lane / 4;
        const uint16_t* p = matrices + (int64_t(tile / L::row_tiles) * L::H + row) * L::H +
                            (warp * L::k_blocks + k) * 32 + 8 * (lane % 4);
        const Word4 upper = load4(p), lower = load4(p + 8 * L::H);
        MMIXER_UNROLL
        for (int half = 0; half < 2; half++) {
          const Word4 fragment = {{upper.word[2 * half], lower.word[2 * half],
                                   upper.word[2 * half + 1], lower.word[2 * half + 1]}};
          if (tile < L::resident)
            resident_[tile < L::resident ? tile : 0][k][half] = fragment;
          else
            store4(shared_ + shared_index(tile, k, half), fragment);
        }
      }
  }

  // This warp's columns' share of W x of one gate, for all rows of the block: sums[samples][rows + 4].
  template <int gate, class Source>
  MMIXER_DEVICE void multiply(const Source& x, float* sums) const {
    float c[L::row_tiles][2][4] = {};
    MMIXER_UNROLL
    for (int k = 0; k < L::k_blocks; k++) {
      Word4 b[L::parts];
      MMIXER_UNROLL
      for (int part = 0; part < L::parts; part++) b[part] = x(part, k);
      MMIXER_UNROLL
      for (int m = 0; m < L::row_tiles; m++)
        MMIXER_UNROLL
        for (int part = L::parts - 1; part >= 0; part--)
          MMIXER_UNROLL
          for (int half = 0; half < 2; half++) {
            const Word4 a = fragment((part * gates + gate) * L::row_tiles + m, k, half);
            MMIXER_UNROLL
            for (int other = L::parts - 1 - part; other >= 0; other--)
              multiply_add(c[m][half], a, b[other].word[2 * half], b[other].word[2 * half + 1]);
          }
    }
    const int lane = thread_index() % 32;
    MMIXER_UNROLL
    for (int m = 0; m < L::row_tiles; m++)
      MMIXER_UNROLL
      for (int i = 0; i < 4; i++) {
        const int sample = 2 * (lane % 4) + i % 2, row = m * 16 + lane / 4 + i / 2 * 8;
        sums[sample * (L::rows + 4) + row] = c[m][0][i] + c[m][1][i];
      }
  }

 private:
  MMIXER_DEVICE static int shared_index(int tile, int k, int half) {
    return (tile - L::resident) * L::tile_words + (k * 2 + half) * L::threads + thread_index();
  }

  MMIXER_DEVICE Word4 fragment(int tile, int k, int half) const {
    if (tile < L::resident) return resident_[tile < L::resident ? tile : 0][k][half];
    return load4(shared_ + shared_index(tile, k, half));
  }

  Word4 resident_[L::resident ? L::resident : 1][L::k_blocks][2];
  Word4* shared_;
};

// The warps' shares of one gate's products.
template <class L>
struct Sums {
  float value[L::warps][L::samples][L::rows + 4];

  MMIXER_DEVICE float* mine() { return &value[thread_index() / 32][0][0]; }

  MMIXER_DEVICE float total(int sample, int row) const {
    float sum = 0;
    MMIXER_UNROLL
    for (int warp = 0; warp < L::warps; warp++) sum += value[warp][sample][row];
    return sum;
  }
};

// The rows' scale and shift, 1 and 0 without LayerNorm and in the padding.
template <class L>
struct Norms {
  float gamma[gates][L::rows], beta[gates][L::rows];

  // norms: [2][G][norm_gates][H] or null
  MMIXER_DEVICE void load(const float* norms, int G, int group, int H, int first) {
    for (int i = thread_index(); i < gates * L::rows; i += L::threads) {
      const int gate = i / L::rows, row = i % L::rows;
      const bool exists = norms && first + row < H;
      const float* p = norms + (int64_t(group) * norm_gates + norm_r + gate) * H + first + row;
      gamma[gate][row] = exists ? cuda::load(p) : 1;
      beta[gate][row] = exists ? cuda::load(p + int64_t(G) * norm_gates * H) : 0;
    }
  }

  MMIXER_DEVICE float apply(int gate, int row, float x) const {
    return x * gamma[gate][row] + beta[gate][row];
  }
};

// Thread's j-th element.
template <class L>
struct Element {
  int sample, row;
  bool exists;  // the same for a whole warp

  MMIXER_DEVICE explicit Element(int j) {
    const int i = thread_index() + j * L::threads;
    sample = i / L::rows, row = i % L::rows, exists = i < L::elements;
  }
};

// Terms of x as a sum of bfloat16.
template <int parts>
MMIXER_DEVICE void split(float x, uint16_t (&term)[parts]) {
  MMIXER_UNROLL
  for (int part = 0; part < parts; part++) {
    term[part] = to_bfloat16(x);
    x -= from_bfloat16(term[part]);
  }
}

}  // namespace mmixer::cuda
