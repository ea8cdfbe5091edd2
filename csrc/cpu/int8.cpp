// This file is compiled once per instruction set that has products of bytes of its own, with
// -DMMIXER_ISA=<name>, that set's flags and -ffp-contract=off: a fused multiply-add would round
// otherwise than the sets without one.
//
// A call owns a range of rows of W. Eight of them at a time stay in L1 while all quantised rows
// pass, each of which is read once for the eight. Bound: the bandwidth of W, a byte per
// multiply-add.
#include "int8.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "vector.h"

namespace mmixer::cpu::MMIXER_ISA {
namespace {

constexpr int columns = 8;  // of a tile

// A register of 32-bit sums, or of the bytes that a step reads of each row. On x86 it has 32 bytes
// also where 64 were possible: W comes no faster from L2 then.
#ifdef __AVX2__
using Register = __m256i;
#else
typedef int32_t Register __attribute__((vector_size(vector_bytes)));
#endif
constexpr int64_t step_bytes = sizeof(Register);

const int8_t* values_of(const void* quantized) {
  return static_cast<const int8_t*>(quantized) + 64;
}

// The values stand in order, but that those past the last whole step stand at the end of a step of
// their own, after zeros: there W is read from its row's end backwards.
void quantize(const float* row, int64_t K, void* quantized) {
  typedef int8_t Bytes __attribute__((vector_size(lanes<float>)));
  constexpr int L = lanes<float>;
  using Integers = IntVector<float>;
  // Floats without their signs are in the order of their bits, NaN above all.
  Integers top = {};
  const auto look = [&](Vector<float> x) {
    const Integers bits = (Integers)x & 0x7fffffff;
    top = bits > top ? bits : top;
  };
  int64_t k = 0;
  for (; k + L <= K; k += L) look(load(row + k));
  if (k < K) look(load(row + k, K - k));
  int32_t bits = 0;
  for (int i = 0; i < L; i++) bits = std::max(bits, int32_t(top[i]));
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  float factor = 127 / largest;
  if (!(factor <= std::numeric_limits<float>::max())) factor = 0;

  int8_t* const values = static_cast<int8_t*>(quantized) + 64;
  Integers sum = {};
  const auto convert = [&](Vector<float> x, int8_t* target) {
    // 1.5 * 2^23 rounds to an integer, whose two's complement is in the low bits.
    const Integers shifted = (Integers)(x * factor + 12582912.f);
    const Bytes bytes = __builtin_convertvector(shifted, Bytes);
    std::memcpy(target, &bytes, sizeof bytes);
    sum += shifted << 24 >> 24;
  };
  for (k = 0; k + L <= K; k += L) convert(load(row + k), values + k);
  if (k < K) convert(load(row + k, K - k), values + k);
  const int64_t whole = K / step_bytes * step_bytes, rest = K - whole;
  if (rest) {
    std::memmove(values + whole + step_bytes - rest, values + whole, rest);
    std::memset(values + whole, 0, step_bytes - rest);
  }
  QuantizedRow head{largest / 127, 0};
  for (int i = 0; i < L; i++) head.sum += sum[i];
  std::memcpy(quantized, &head, sizeof head);
}

// sum + products of four bytes each. Instructions of x86 multiply bytes without sign by bytes with
// one.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// w + 128 has none: 128 times the sum of the row is subtracted in the end.
constexpr bool is_shifted = true;
inline Register add(Register sum, Register q, Register w) {
  w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
#ifdef __AVX512VNNI__
  return _mm256_dpbusd_epi32(sum, w, q);
#else
  return _mm256_dpbusd_avx_epi32(sum, w, q);
#endif
}
#elif defined(__AVX2__)
// |w| has none, and q takes w's sign. Two products fit in 16 bits, as 2 * 128 * 127 does.
constexpr bool is_shifted = false;
inline Register add(Register sum, Register q, Register w) {
  const Register pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
// Bytes of even and of odd number are halves of 16-bit words, in which two products fit.
constexpr bool is_shifted = false;
inline Register add(Register sum, Register q, Register w) {
  typedef int16_t Words __attribute__((vector_size(sizeof(Register))));
  const auto even = [](Register x) { return (Words)x << 8 >> 8; };
  const auto odd = [](Register x) { return (Words)x >> 8; };
  const Register pairs = (Register)(even(q) * even(w) + odd(q) * odd(w));
  return sum + (pairs << 16 >> 16) + (pairs >> 16);
}
#endif

// The sums over the lanes of each of a tile's registers.
inline void sum_lanes(const Register (&x)[columns], int32_t (&total)[columns]) {
#ifdef __AVX2__
  __m256i y[4], z[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) y[i] = _mm256_hadd_epi32(x[2 * i], x[2 * i + 1]);
  for (int i = 0; i < 2; i++) z[i] = _mm256_hadd_epi32(y[2 * i], y[2 * i + 1]);
  const __m256i all = _mm256_add_epi32(_mm256_permute2x128_si256(z[0], z[1], 0x20),
                                       _mm256_permute2x128_si256(z[0], z[1], 0x31));
  std::memcpy(total, &all, sizeof all);
#else
  for (int i = 0; i < columns; i++) {
    total[i] = 0;
    for (int lane = 0; lane < int(sizeof(Register) / 4); lane++) total[i] += x[i][lane];
  }
#endif
}

// c[j] = the product of a quantised row and the row w[j], of which the first `count` are a tile's.
void tile(const void* quantized, const int8_t* const (&w)[columns], int64_t K,
          const float* weight_scale, int64_t count, float* c) {
  QuantizedRow head;
  std::memcpy(&head, quantized, sizeof head);
  const int8_t* const values = values_of(quantized);
  const auto load_bytes = [](const int8_t* p) {
    Register bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return bytes;
  };
  Register sums[columns] = {};
  int64_t k = 0;
  for (; k + step_bytes <= K; k += step_bytes) {
    const Register q = load_bytes(values + k);
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++) sums[j] = add(sums[j], q, load_bytes(w[j] + k));
  }
  if (k < K) {
    const Register q = load_bytes(values + k);
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++) {
      int8_t buffer[step_bytes] = {};
      if (K < step_bytes) std::copy_n(w[j], K, buffer + step_bytes - K);
      sums[j] = add(sums[j], q, load_bytes(K < step_bytes ? buffer : w[j] + (K - step_bytes)));
    }
  }
  int32_t total[columns];
  sum_lanes(sums, total);
  for (int64_t j = 0; j < count; j++) {
    // Sums of w + 128 wrap around, and come back.
    if (is_shifted) total[j] = int32_t(uint32_t(total[j]) - 128 * uint32_t(head.sum));
    c[j] = weight_scale[j] * head.scale * float(total[j]);
  }
}

void product(const void* const* rows, int64_t M, const int8_t* w, int64_t w_stride, int64_t K,
             const float* weight_scale, int64_t n, int64_t n_end, float* const* c) {
  for (; n < n_end; n += columns) {
    const int64_t count = std::min<int64_t>(columns, n_end - n);
    const int8_t* of_tile[columns];  // the last one again where there are fewer
    for (int64_t j = 0; j < columns; j++) of_tile[j] = w + (n + std::min(j, count - 1)) * w_stride;
    for (int64_t m = 0; m < M; m++) tile(rows[m], of_tile, K, weight_scale + n, count, c[m] + n);
  }
}

}  // namespace

extern const Int8Kernels int8_kernels;
const Int8Kernels int8_kernels{quantize, product};

}  // namespace mmixer::cpu::MMIXER_ISA
