// Memory for the stacks and the shared memory of the blocks that run at the same time.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "sanitizers.h"

namespace mmixer::cuda::emulator {

class Arena {
 public:
  static constexpr size_t page = 4096, red_zone = 256;
  static constexpr size_t stack_bytes = (tsan::enabled ? 256 : 64) << 10;

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { release(); }

  void reserve(int threads, int blocks, size_t shared_bytes) {
    shared_bytes_ = shared_bytes;
    stride_ = (shared_bytes + 127) / 128 * 128 + red_zone;
    const size_t shared = (blocks * stride_ + page - 1) / page * page;
    // A new mapping has no history for ThreadSanitizer.
    if (tsan::enabled || threads > threads_ || shared > shared_) {
      release();
      map(std::max(threads, threads_), std::max(shared, shared_));
    }
    ASAN_UNPOISON_MEMORY_REGION(memory_, size());
    for (int i = 0; i < blocks; ++i) {
      std::memset(shared_of(i), 0xff, shared_bytes);
      std::memset(shared_of(i) + shared_bytes, pattern, stride_ - shared_bytes);
      ASAN_POISON_MEMORY_REGION(shared_of(i) + shared_bytes, stride_ - shared_bytes);
    }
  }

  char* stack_of(int thread) const { return memory_ + shared_ + thread * stack_bytes + page; }
  size_t stack_size() const { return stack_bytes - page; }
  char* shared_of(int block) const { return memory_ + block * stride_; }

  bool red_zone_intact(int block) const {
    ASAN_UNPOISON_MEMORY_REGION(shared_of(block) + shared_bytes_, stride_ - shared_bytes_);
    const char* const zone = shared_of(block);
    return std::all_of(zone + shared_bytes_, zone + stride_, [](char c) { return c == pattern; });
  }

 private:
  static constexpr char pattern = 0x5a;
  static constexpr int most_guards = 16000;  // Linux has 65530 mappings per process

  size_t size() const { return shared_ + threads_ * stack_bytes; }

  void map(int threads, size_t shared) {
    const size_t size = shared + threads * stack_bytes;
    void* const memory = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    threads_ = threads;
    shared_ = shared;
    if (threads <= most_guards)
      for (int i = 0; i < threads; ++i) mprotect(stack_of(i) - page, page, PROT_NONE);
  }

  void release() {
    if (!memory_) return;
    ASAN_UNPOISON_MEMORY_REGION(memory_, size());
    munmap(memory_, size());
    memory_ = nullptr;
  }

  char* memory_ = nullptr;
  int threads_ = 0;
  size_t shared_ = 0, shared_bytes_ = 0, stride_ = 0;
};

}  // namespace mmixer::cuda::emulator
