// Threads and scratch memory of the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "recycled.h"
#include "vector.h"

namespace fastflow {

// Roughly how many cycles are worth a thread, for choosing the grain of a loop.
inline constexpr int64_t kThreadCycles = 20000;

// f(begin, end) over [0, count), in pieces of at least `grain`; small loops never leave the thread.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain || in_forked_child)
    f(int64_t(0), count);
  else
    torch::stable::parallel_for(0, count, grain, f);
}

// f(i) for i in [0, count): the threads take one after the other, for work of uneven size. What f
// writes for i must not depend on who runs it, or when.
template <class F>
void parallel_tasks(int64_t count, bool worth_threads, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  };
  const int64_t threads =
      worth_threads ? std::min<int64_t>(count, torch::stable::get_num_threads()) : 1;
  parallel_for(threads, 1, work);
}

// Uninitialised memory aligned to a cache line, kept by its thread from call to call; if it is
// large, as recycled.h says. `Owner` separates the buffers of nested users: a thread that runs a
// call also runs tiles.
template <class Owner>
class Scratch {
 public:
  explicit Scratch(size_t bytes) : recycled_bytes_(bytes > kMostThreadBytes ? bytes : 0) {
    if (recycled_bytes_) {
      data_ = static_cast<char*>(Recycled::all().take(bytes));
    } else {
      static thread_local Buffer buffer;
      data_ = buffer.grown_to(bytes);
    }
    next_ = data_;
  }
  ~Scratch() {
    if (recycled_bytes_) Recycled::all().give(data_, recycled_bytes_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Hands out the next `count` elements; the constructor's `bytes` must cover the sum of
  // bytes<T>(count) over all takes.
  template <class T>
  T* take(int64_t count) {
    char* taken = next_;
    next_ += bytes<T>(count);
    return reinterpret_cast<T*>(taken);
  }
  template <class T>
  static constexpr size_t bytes(int64_t count) {
    return (size_t(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  static constexpr size_t kAlignment = size_t(Recycled::kAlignment);
  static constexpr size_t kMostThreadBytes = size_t(4) << 20;

  class Buffer {
   public:
    char* grown_to(size_t bytes) {
      if (bytes > size_) {
        release();
        data_ = static_cast<char*>(::operator new(bytes, Recycled::kAlignment));
        size_ = bytes;
      }
      return data_;
    }
    ~Buffer() { release(); }

   private:
    void release() {
      ::operator delete(data_, Recycled::kAlignment);
      data_ = nullptr;
      size_ = 0;
    }

    char* data_ = nullptr;
    size_t size_ = 0;
  };

  size_t recycled_bytes_;  // 0: it is the thread's
  char* data_;
  char* next_;
};

}  // namespace fastflow
