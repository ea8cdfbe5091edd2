// The emulator's messages to the sanitizers. ThreadSanitizer takes each fiber for a thread, and
// learns which one runs and what orders memory between them; AddressSanitizer learns whose stack is
// in use. Without a sanitizer the functions do nothing. csrc/emulator is compiled without
// -fsanitize=thread, so that its own accesses are not seen.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef MMIXER_EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
long __tsan_atomic64_load(const volatile long* address, int order);
void __tsan_atomic64_store(volatile long* address, long value, int order);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace mmixer::cuda::emulator {

namespace tsan {

#ifdef MMIXER_EMULATOR_TSAN
constexpr bool enabled = true;
constexpr int most_fibers = 7000;  // the sanitizer has room for 8128 threads
constexpr unsigned without_order = 1;
constexpr int relaxed = 0;

inline void* this_fiber() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }
inline void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, without_order); }
inline void acquire(void* token) { __tsan_acquire(token); }
inline void release(void* token) { __tsan_release(token); }
inline void read(void* p, size_t size) { __tsan_read_range(p, size); }
inline void write(void* p, size_t size) { __tsan_write_range(p, size); }

inline uint64_t load_relaxed(const uint64_t* p) {
  return __tsan_atomic64_load(reinterpret_cast<const volatile long*>(p), relaxed);
}

inline void store_relaxed(uint64_t* p, uint64_t x) {
  __tsan_atomic64_store(reinterpret_cast<volatile long*>(p), long(x), relaxed);
}

// While it lives, memory that a fiber allocates and frees for the emulator does not count as its
// accesses.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
constexpr bool enabled = false;
constexpr int most_fibers = 0;

inline void* this_fiber() { return nullptr; }
inline void* create() { return nullptr; }
inline void destroy(void*) {}
inline void switch_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}
inline void read(void*, size_t) {}
inline void write(void*, size_t) {}
inline uint64_t load_relaxed(const uint64_t* p) {
  return *reinterpret_cast<const volatile uint64_t*>(p);
}
inline void store_relaxed(uint64_t* p, uint64_t x) { *reinterpret_cast<volatile uint64_t*>(p) = x; }

struct Unseen {
  Unseen() {}
};
#endif

}  // namespace tsan

struct Stack {
  const void* bottom = nullptr;
  size_t size = 0;
};

#ifdef __SANITIZE_ADDRESS__
inline void before_switch(const Stack& to) {
  __sanitizer_start_switch_fiber(nullptr, to.bottom, to.size);
}
inline Stack after_switch() {
  Stack from;
  __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size);
  return from;
}
#else
inline void before_switch(const Stack&) {}
inline Stack after_switch() { return {}; }
#endif

}  // namespace mmixer::cuda::emulator
