// Large memory on the CPU, for results and for kernels to work in. When its user is gone it is kept
// for the next call: a call that writes megabytes otherwise waits for the system to map and clear
// as many pages, as often as the C library has returned them: that can take longer than the
// computation.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <new>

#include "forked.h"

namespace fastflow {

// Results of fewer bytes are left to PyTorch's allocator: the C library keeps small memory itself.
inline constexpr size_t kRecycledBytes = size_t(1) << 16;

class Recycled {
 public:
  // Blocks of the process. Never destroyed: tensors may outlive whatever is destroyed at its end.
  static Recycled& all() {
    static Recycled& blocks = *new Recycled(limit_from_environment());
    return blocks;
  }

  static constexpr std::align_val_t kAlignment{64};

  explicit Recycled(size_t limit) : limit_(limit) {}

  bool keeps(size_t bytes) const { return bytes >= kRecycledBytes && bytes <= limit_; }

  void* take(size_t bytes) {
    // a lock that another thread held while the process was forked is held forever in the child
    if (!in_forked_child) {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = std::find_if(free_.rbegin(), free_.rend(),
                                      [&](const Block& block) { return block.bytes == bytes; });
      if (found != free_.rend()) {
        void* data = found->data;
        kept_ -= bytes;
        free_.erase(std::next(found).base());
        return data;
      }
    }
    return ::operator new(bytes, kAlignment);
  }

  // Keeps the block, if it is of a size to keep; those that have waited longest make room for it,
  // one by one, for to return memory to the system takes long.
  void give(void* data, size_t bytes) noexcept {
    while (!in_forked_child && keeps(bytes)) {
      void* oldest = data;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (kept_ + bytes <= limit_ && push(data, bytes)) return;
        if (free_.empty()) break;
        oldest = free_.front().data;
        kept_ -= free_.front().bytes;
        free_.pop_front();
      }
      release(oldest);
    }
    release(data);
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  // False if there is no memory to remember the block in.
  bool push(void* data, size_t bytes) noexcept {
    try {
      free_.push_back({data, bytes});
    } catch (const std::bad_alloc&) {
      return false;
    }
    kept_ += bytes;
    return true;
  }

  static void release(void* data) { ::operator delete(data, kAlignment); }

  // What is not a whole number counts as not set.
  static size_t limit_from_environment() {
    constexpr size_t most = std::numeric_limits<size_t>::max() >> 20;
    size_t mebibytes = 64, given = 0;
    if (const char* text = std::getenv("FASTFLOW_KEEP_MIB")) {
      const char* end = text + std::strlen(text);
      const auto [rest, error] = std::from_chars(text, end, given);
      if (error == std::errc() && rest == end) mebibytes = std::min(given, most);
    }
    return mebibytes << 20;
  }

  const size_t limit_;
  std::mutex mutex_;
  std::deque<Block> free_;  // the one that was given last at the end
  size_t kept_ = 0;
};

}  // namespace fastflow
