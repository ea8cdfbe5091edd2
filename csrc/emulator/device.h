// The device layer on a CPU, for tests: each CUDA thread is a fiber (machine.h), and all fibers of
// a launch share one thread of the host. Only csrc/cuda/device.h includes this file.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define MMIXER_DEVICE inline

namespace mmixer::cuda {

// The place where a kernel calls a function of this layer: messages and faults name the call by it.
struct Site {
  const char* file;
  int line;
};

#define MMIXER_SITE ::mmixer::cuda::Site site = {__builtin_FILE(), __builtin_LINE()}

int thread_index();
int block_index();

void block_sync(MMIXER_SITE);
void warp_sync(MMIXER_SITE);
void cluster_sync(MMIXER_SITE);

float shuffle_xor(float x, int mask, MMIXER_SITE);
double shuffle_xor(double x, int mask, MMIXER_SITE);
template <bool half>
void multiply_add(float (&c)[4], const Word4& a, uint32_t b0, uint32_t b1, MMIXER_SITE);

void store_packet(uint64_t* p, uint32_t data, uint32_t tag);
void store_packet(Word4* p, const uint32_t (&data)[3], uint32_t tag);
uint64_t load_packet(const uint64_t* p, MMIXER_SITE);
Word4 load_packet(const Word4* p, MMIXER_SITE);
bool packet_ready(uint64_t packet, uint32_t tag, MMIXER_SITE);
bool packet_ready(const Word4& packet, uint32_t tag, MMIXER_SITE);

void mbarrier_init(Mbarrier* barrier, int arrivals, MMIXER_SITE);
void mbarrier_init_fence();
void mbarrier_expect(Mbarrier* barrier, int bytes, MMIXER_SITE);
void mbarrier_wait(Mbarrier* barrier, uint32_t parity, MMIXER_SITE);

void store_async(float* p, int rank, float x, Mbarrier* barrier, MMIXER_SITE);
void store_async(Word4* p, int rank, const Word4& x, Mbarrier* barrier, MMIXER_SITE);

#undef MMIXER_SITE

template <class T>
inline T load(const T* p) {
  return *p;
}

namespace detail {

[[noreturn]] void fail_misaligned(const void* p, int bytes);

inline void check_aligned(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail_misaligned(p, bytes);
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Drops `dropped` bits, rounding to nearest even. A carry into the exponent is right as it is.
inline uint32_t round_off(uint32_t bits, int dropped) {
  return (bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1)) >> dropped;
}

}  // namespace detail

inline Word2 load2(const void* p) {
  Word2 x;
  detail::check_aligned(p, sizeof x);
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Word4 load4(const void* p) {
  Word4 x;
  detail::check_aligned(p, sizeof x);
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store4(void* p, const Word4& x) {
  detail::check_aligned(p, sizeof x);
  std::memcpy(p, &x, sizeof x);
}

// Both conversions turn every NaN into 0x7fff, as the device does.
inline uint16_t to_bfloat16(float x) {
  return x != x ? 0x7fff : uint16_t(detail::round_off(detail::bits_of(x), 16));
}

inline float from_bfloat16(uint16_t x) { return detail::float_of(uint32_t(x) << 16); }

inline uint16_t to_float16(float x) {
  constexpr uint32_t rebias = (127 - 15) << 23;
  constexpr float smallest_normal = 1.f / (1 << 14), overflow = 65536;
  const float size = std::fabs(x);
  uint32_t half;
  if (x != x) return 0x7fff;
  if (size >= overflow)
    half = 0x7c00;
  else if (size >= smallest_normal)
    half = detail::round_off(detail::bits_of(size) - rebias, 13);
  else  // the last place of 0.5 is that of a subnormal: the addition rounds
    half = detail::bits_of(size + .5f) - detail::bits_of(.5f);
  return uint16_t(half | (std::signbit(x) ? 0x8000 : 0));
}

inline float from_float16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
  float size;
  if (exponent == 0)
    size = float(fraction) / (1 << 24);
  else
    size = detail::float_of((exponent == 31 ? 255 : exponent + 127 - 15) << 23 | fraction << 13);
  return detail::float_of(detail::bits_of(size) | sign);
}

inline float reciprocal_root(float x) { return 1 / std::sqrt(x); }
inline float reciprocal_root_of_normal(float x) { return 1 / std::sqrt(x); }
inline double reciprocal_root(double x) { return 1 / std::sqrt(x); }

inline float reciprocal_of_normal(float x) { return 1 / x; }

inline float approximate_tanh(float x) { return std::tanh(x); }

}  // namespace mmixer::cuda
