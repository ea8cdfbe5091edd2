// The device's functions that a kernel may use, under names of our own, so that one source runs on
// a GPU and, by csrc/emulator, on a CPU. A kernel is a class with Arguments, threads and `static
// void run(void* shared, const Arguments&)`; launch<Kernel>() starts it.
//
// The orders: a wait on an mbarrier acquires, at cluster scope, what arrived in shared memory; a
// packet is its own flag (it is loaded and stored as one) and orders nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mmixer::cuda {

struct alignas(8) Word2 {
  uint32_t word[2];
};

struct alignas(16) Word4 {
  uint32_t word[4];
};

using Mbarrier = uint64_t;

// The blocks of a cluster are consecutive; cluster = 1 means no cluster.
struct Grid {
  int blocks;
  int cluster;
  bool cooperative;  // all blocks are resident at once
  size_t shared_bytes;
  void* stream;     // cudaStream_t
  int threads = 0;  // per block, at most Kernel::threads, which 0 stands for
};

}  // namespace mmixer::cuda

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define MMIXER_DEVICE __device__ __forceinline__
#define MMIXER_CONSTANT __host__ __device__ constexpr
#define MMIXER_UNROLL _Pragma("unroll")
#define MMIXER_NO_UNROLL _Pragma("unroll 1")

namespace mmixer::cuda {

MMIXER_DEVICE int thread_index() { return threadIdx.x; }
MMIXER_DEVICE int block_index() { return blockIdx.x; }

MMIXER_DEVICE void block_sync() { __syncthreads(); }
MMIXER_DEVICE void warp_sync() { __syncwarp(); }

MMIXER_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
MMIXER_DEVICE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

template <class T>
MMIXER_DEVICE T load(const T* p) {
  return __ldg(p);
}

MMIXER_DEVICE Word2 load2(const void* p) {
  const uint2 v = *static_cast<const uint2*>(p);
  return {{v.x, v.y}};
}

MMIXER_DEVICE Word4 load4(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}

MMIXER_DEVICE void store4(void* p, const Word4& x) {
  *static_cast<uint4*>(p) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}

MMIXER_DEVICE uint16_t to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
MMIXER_DEVICE float from_bfloat16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
MMIXER_DEVICE uint16_t to_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }
MMIXER_DEVICE float from_float16(uint16_t x) { return __half2float(__ushort_as_half(x)); }

MMIXER_DEVICE float reciprocal_root(float x) { return rsqrtf(x); }

// 1 / sqrt(x) of a normal number, to 2 units in the last place.
MMIXER_DEVICE float reciprocal_root_of_normal(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MMIXER_DEVICE double reciprocal_root(double x) { return 1 / sqrt(x); }

// 1 / x of a normal number whose reciprocal is normal too, to 1 unit in the last place.
MMIXER_DEVICE float reciprocal_of_normal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y + y * (1 - x * y);  // Newton's step: the hardware's result is a unit off
}

// The hardware's tanh: relative error 2^-11, an eighth of bfloat16's rounding.
MMIXER_DEVICE float approximate_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c += a b, a [16, 16] row major, b [16, 8] column major, of float16 or bfloat16; every lane of the
// warp takes part.
template <bool half>
MMIXER_DEVICE void multiply_add(float (&c)[4], const Word4& a, uint32_t b0, uint32_t b1) {
  if constexpr (half)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}

// A packet is one word of data, or three, beside a tag: 8 or 16 bytes that are one access.
MMIXER_DEVICE void store_packet(uint64_t* p, uint32_t data, uint32_t tag) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(uint64_t(tag) << 32 | data)
               : "memory");
}

MMIXER_DEVICE uint64_t load_packet(const uint64_t* p) {
  uint64_t packet;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(packet) : "l"(p) : "memory");
  return packet;
}

MMIXER_DEVICE void store_packet(Word4* p, const uint32_t (&data)[3], uint32_t tag) {
  asm volatile(
      "{\n.reg .b128 packet;\n"
      "mov.b128 packet, {%1, %2};\n"
      "st.relaxed.gpu.global.b128 [%0], packet;\n}" ::"l"(p),
      "l"(uint64_t(data[1]) << 32 | data[0]), "l"(uint64_t(tag) << 32 | data[2])
      : "memory");
}

MMIXER_DEVICE Word4 load_packet(const Word4* p) {
  uint64_t low, high;
  asm volatile(
      "{\n.reg .b128 packet;\n"
      "ld.relaxed.gpu.global.b128 packet, [%2];\n"
      "mov.b128 {%0, %1}, packet;\n}"
      : "=l"(low), "=l"(high)
      : "l"(p)
      : "memory");
  return {{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}};
}

MMIXER_DEVICE bool packet_ready(uint64_t packet, uint32_t tag) { return (packet >> 32) == tag; }
MMIXER_DEVICE bool packet_ready(const Word4& packet, uint32_t tag) { return packet.word[3] == tag; }

// The functions from here to #else need compute capability 9.0 or newer.

MMIXER_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The address of p's twin in the shared memory of the cluster's block `rank`.
MMIXER_DEVICE uint32_t twin_address(const void* p, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}

MMIXER_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

MMIXER_DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

MMIXER_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

MMIXER_DEVICE void mbarrier_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// A store_async is weak, and its completion on the barrier has release semantics at cluster scope.
// A look that reads the completed phase, relaxed at cluster scope and followed by a fence.acquire
// of that scope, is an acquire pattern, and so synchronises with all completions of the phase.
// sync_restrict narrows what the fence orders to objects in the cluster's shared memory, where all
// messages land. An acquire of all memory would invalidate L1 besides (CCTL.IVALL) at each
// wait. The fence ends when no load of this thread is in flight: what is loaded ahead is loaded
// right behind a wait, not before one.
//
// The other direction, that a sender has read what its message allows others to overwrite, is
// program order in the thread that sends, and a warp_sync or block_sync between it and the other
// readers.
MMIXER_DEVICE void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208  // PTX 8.6
  asm volatile(
      "{\n.reg .pred done;\n"
      "again%=:\n"
      "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again%=;\n"
      "fence.acquire.sync_restrict::shared::cluster.cluster;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred done;\n"
      "again%=:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again%=;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// Stores to the twin of p in block `rank`, and counts the bytes on the twin of the barrier.
MMIXER_DEVICE void store_async(float* p, int rank, float x, Mbarrier* barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
          twin_address(p, rank)),
      "r"(__float_as_uint(x)), "r"(twin_address(barrier, rank))
      : "memory");
}

MMIXER_DEVICE void store_async(Word4* p, int rank, const Word4& x, Mbarrier* barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
      "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(twin_address(p, rank)),
      "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3]),
      "r"(twin_address(barrier, rank))
      : "memory");
}

}  // namespace mmixer::cuda

#else

#include "../emulator/device.h"

#define MMIXER_CONSTANT constexpr
#define MMIXER_UNROLL
#define MMIXER_NO_UNROLL

#endif

namespace mmixer::cuda {

MMIXER_DEVICE uint32_t word_of(uint64_t packet, int) { return uint32_t(packet); }
MMIXER_DEVICE uint32_t word_of(const Word4& packet, int i) { return packet.word[i]; }

MMIXER_DEVICE void set_tag(uint64_t& packet, uint32_t tag) { packet = uint64_t(tag) << 32; }
MMIXER_DEVICE void set_tag(Word4& packet, uint32_t tag) { packet.word[3] = tag; }

MMIXER_DEVICE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The sum over a warp, in each of its lanes.
template <class T>
MMIXER_DEVICE T warp_sum(T x) {
  MMIXER_UNROLL
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

MMIXER_DEVICE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

}  // namespace mmixer::cuda
