// The memory that the CPU engine's calls work in, kept from one call to the next.
//
// A block of some megabytes that is freed goes back to the kernel, and the next call faults in each
// page of it again: a quarter of the time of a short sequence. So each thread keeps the block of
// its largest call up to a limit; what exceeds the limit is the call's own. Where the kernel gives
// huge pages to those who ask (Linux's default), blocks of megabytes have them: packed weights then
// miss no TLB, which is three percent of a sequence.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <memory>
#include <new>
#include <string>

// What Python raises as a MemoryError of this text.
class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(int64_t bytes)
      : text_(std::make_shared<std::string>(
            "a call of the CPU engine needs " + std::to_string(bytes) +
            " bytes to work in, which the system does not give: call it with fewer samples or "
            "steps at once")) {}
  const char* what() const noexcept override { return text_->c_str(); }

 private:
  std::shared_ptr<const std::string> text_;  // copies of an exception must not throw
};

class Workspace {
 public:
  // Memory for one call of this thread. Until the Workspace is gone no other call of the thread
  // may have one: between the two there must be no call of Python.
  explicit Workspace(int64_t bytes) {
    if (bytes > limit) {
      own_ = allocate(bytes);
      memory_ = own_.get();
      return;
    }
    thread_local Kept kept;
    if (kept.bytes < bytes) {
      kept = Kept{};  // before the larger block is there
      kept.memory = allocate(bytes);
      kept.bytes = bytes;
    }
    memory_ = kept.memory.get();
  }

  void* get() const { return memory_; }

  static constexpr int64_t limit = int64_t(32) << 20;

 private:
  static constexpr int64_t page = int64_t(2) << 20;  // a huge one

  struct Free {
    std::align_val_t alignment;
    void operator()(char* memory) const { ::operator delete(memory, alignment); }
  };
  using Memory = std::unique_ptr<char, Free>;
  struct Kept {
    Memory memory{nullptr, Free{}};
    int64_t bytes = 0;
  };

  // Aligned at least to lines of the caches, as torch's memory is; throws NoMemory.
  static Memory allocate(int64_t bytes) {
    const bool is_large = bytes >= page;
    const std::align_val_t alignment{is_large ? size_t(page) : 64};
    const int64_t size = is_large ? (bytes + page - 1) / page * page : bytes;
    Memory memory(static_cast<char*>(::operator new(size_t(size), alignment, std::nothrow)),
                  Free{alignment});
    if (!memory) throw NoMemory(bytes);
#ifdef __linux__
    if (is_large) madvise(memory.get(), size_t(size), MADV_HUGEPAGE);  // advice: it may fail
#endif
    return memory;
  }

  Memory own_{nullptr, Free{}};
  void* memory_;
};
