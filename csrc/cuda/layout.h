// The layouts in which a team of blocks shares the recurrent weights of one weight set, so that
// they stay on the chip for a whole sequence: block c of C keeps rows c H/C ... (c + 1) H/C of W_r,
// W_z and W_h, each of its warps a tile of the rows and a share of the columns. A team advances 8
// samples, the width of one tensor-core product, or 4: then half of each product is not used, but
// an exchange has half the bytes.
//
// A float is a sum of `terms` bfloat16 terms, and a product keeps the pairs of terms whose orders
// sum to less than that: 1 is bfloat16, 2 has relative error 2^-16, 3 has float32's. A float may
// also be one float16 term.
#pragma once

#include "arguments.h"
#include "device.h"

namespace mmixer::cuda {

constexpr int greatest_common_divisor(int a, int b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

// H: the hidden size, padded. A warp takes one tile of 16 rows, where that divides the warps
// evenly, and a share of the columns, so that few warps' sums are to be added; else all rows.
// resident: the number of a warp's tiles, of all gates and terms, whose weights lie in registers;
// the others lie in shared memory.
template <int H_, int C_, int warps_, int terms_, int resident_, int samples_ = 8,
          Dtype term_dtype_ = Dtype::bfloat16>
struct Layout {
  static constexpr int H = H_, C = C_, warps = warps_, terms = terms_, resident = resident_;
  static constexpr int samples = samples_;
  static constexpr Dtype term_dtype = term_dtype_;
  // The dtype of forward's results, and of its products' operands outside the recurrence.
  static constexpr Dtype state_dtype = terms > 1 ? Dtype::float32 : term_dtype;
  // tanh.approx has an eighth of bfloat16's rounding error, but all of float16's.
  static constexpr bool approximate = terms == 1 && term_dtype == Dtype::bfloat16;
  static constexpr int threads = 32 * warps;
  static constexpr int rows = H / C;
  static constexpr int row_groups = warps % (rows / 16) == 0 ? rows / 16 : 1;
  static constexpr int column_groups = warps / row_groups;
  static constexpr int row_tiles = rows / 16 / row_groups;      // per warp and gate
  static constexpr int k_blocks = H / 32 / column_groups;       // per warp, of 32 columns each
  static constexpr int tiles = terms * step_gates * row_tiles;  // per warp
  static constexpr int tile_words = k_blocks * 2 * threads;     // of type Word4, per block
  static constexpr int shared_words = (tiles - resident) * tile_words;
  // The elements (sample, row) of a gate that a block owns: one per thread of the first warps.
  static constexpr int elements = samples * rows;
  static constexpr bool every_warp_owns = elements == threads;
  // `lanes` neighbouring lanes hold rows of one sample and make one sum of them; a team makes
  // `sums` of them per sample.
  static constexpr int lanes = greatest_common_divisor(rows, 32);
  static constexpr int sums = C * rows / lanes;
  // A sample's stride in shared memory: 64 bytes more than a multiple of 128, against bank
  // conflicts.
  static constexpr int stride = H + 32;

  static_assert(samples == 4 || samples == 8);
  static_assert(term_dtype == Dtype::bfloat16 || (term_dtype == Dtype::float16 && terms == 1));
  static_assert(H % C == 0 && rows % 16 == 0 && H % (32 * column_groups) == 0);
  static_assert(elements <= threads && elements % 32 == 0, "a thread owns an element at most");
  static_assert(0 <= resident && resident <= tiles && sums % 4 == 0);
};

// An operand, [terms][samples][stride] in shared memory. A lane's share of 32 columns is one
// 16-byte load: columns are permuted inside the 32, in the weights alike.
template <class L>
struct SharedOperand {
  const uint16_t* x;

  MMIXER_DEVICE Word4 operator()(int term, int k) const {
    const int lane = thread_index() % 32, columns = thread_index() / 32 % L::column_groups;
    return load4(x + (term * L::samples + lane / 4 % L::samples) * L::stride +
                 (columns * L::k_blocks + k) * 32 + 8 * (lane % 4));
  }
};

// A SharedOperand in registers, read before a message overwrites it.
template <class L>
struct HeldOperand {
  Word4 word[L::terms][L::k_blocks];

  MMIXER_DEVICE void read(const SharedOperand<L>& source) {
    MMIXER_UNROLL
    for (int term = 0; term < L::terms; term++) MMIXER_UNROLL
    for (int k = 0; k < L::k_blocks; k++) word[term][k] = source(term, k);
  }

  MMIXER_DEVICE Word4 operator()(int term, int k) const { return word[term][k]; }
};

// x(first) + ... + x(first + count - 1), in a chain of log2(count) additions.
template <int first, int count, class X>
MMIXER_DEVICE float pairwise_sum(X x) {
  if constexpr (count == 1)
    return x(first);
  else
    return pairwise_sum<first, count / 2>(x) +
           pairwise_sum<first + count / 2, count - count / 2>(x);
}

// The warps' shares of one gate's products.
template <class L>
struct Sums {
  float value[L::column_groups][L::samples][L::rows + 4];

  // Puts this lane's share of a product of 16 rows and 8 samples: slots 0 to 3 of tile m.
  MMIXER_DEVICE void put(int m, int slot, float x) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int sample = 2 * (lane % 4) + slot % 2;
    const int row = (warp / L::column_groups * L::row_tiles + m) * 16 + lane / 4 + slot / 2 * 8;
    if (L::samples == 8 || sample < L::samples) value[warp % L::column_groups][sample][row] = x;
  }

  MMIXER_DEVICE float total(int sample, int row) const {
    return pairwise_sum<0, L::column_groups>(
        [&](int columns) { return value[columns][sample][row]; });
  }
};

template <class L>
class Weights {
 public:
  // matrices: [terms][3][H][H], row-major; shared: L::shared_words.
  MMIXER_DEVICE void load(const uint16_t* matrices, Word4* shared, int rank) {
    shared_ = shared;
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int first_row = rank * L::rows + warp / L::column_groups * L::row_tiles * 16 + lane / 4;
    const int columns = warp % L::column_groups;
    MMIXER_UNROLL
    for (int tile = 0; tile < L::tiles; tile++) MMIXER_UNROLL
    for (int k = 0; k < L::k_blocks; k++) {
      const int row = first_row + tile % L::row_tiles * 16;
      const uint16_t* p = matrices + (int64_t(tile / L::row_tiles) * L::H + row) * L::H +
                          (columns * L::k_blocks + k) * 32 + 8 * (lane % 4);
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

  // Puts this warp's columns' share of one gate's W x, for its rows.
  template <int gate, class Source>
  MMIXER_DEVICE void multiply(const Source& x, Sums<L>& sums) const {
    // A tensor core's sum takes 33 cycles and a product 8, so that four chains keep it busy.
    constexpr int chains = L::row_tiles == 1 && L::k_blocks > 1 ? 4 : 2;
    float c[L::row_tiles][chains][4] = {};
    MMIXER_UNROLL
    for (int k = 0; k < L::k_blocks; k++) {
      Word4 b[L::terms];
      MMIXER_UNROLL
      for (int term = 0; term < L::terms; term++) b[term] = x(term, k);
      MMIXER_UNROLL
      for (int m = 0; m < L::row_tiles; m++) MMIXER_UNROLL
      for (int term = L::terms - 1; term >= 0; term--) MMIXER_UNROLL
      for (int half = 0; half < 2; half++) {
        const Word4 a = fragment((term * step_gates + gate) * L::row_tiles + m, k, half);
        MMIXER_UNROLL
        for (int other = L::terms - 1 - term; other >= 0; other--)
          multiply_add<L::term_dtype == Dtype::float16>(c[m][(2 * k + half) % chains], a,
                                                        b[other].word[2 * half],
                                                        b[other].word[2 * half + 1]);
      }
    }
    MMIXER_UNROLL
    for (int m = 0; m < L::row_tiles; m++) MMIXER_UNROLL
    for (int i = 0; i < 4; i++)
      sums.put(m, i, pairwise_sum<0, chains>([&](int chain) { return c[m][chain][i]; }));
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

// The terms of x.
template <class L>
MMIXER_DEVICE void split(float x, uint16_t (&terms)[L::terms]) {
  if constexpr (L::term_dtype == Dtype::float16) {
    terms[0] = to_float16(x);
  } else {
    MMIXER_UNROLL
    for (int i = 0; i < L::terms; i++) {
      terms[i] = to_bfloat16(x);
      x -= from_bfloat16(terms[i]);
    }
  }
}

}  // namespace mmixer::cuda
