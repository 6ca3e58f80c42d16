// Threads and scratch memory of the CPU kernels.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "vector.h"

namespace fastflow {

// True in a process that was forked without exec. An OpenMP runtime that has worked in the parent
// has no threads left in the child and would wait for them forever (a data loader's workers are
// such children), so kernels run serially there.
inline bool in_forked_child = false;
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

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

// Uninitialised memory aligned to a cache line, kept by its thread from call to call unless it is
// large. `Owner` separates the buffers of nested users: a thread that runs a call also runs tiles.
template <class Owner>
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    Buffer& buffer = mine();
    if (bytes > buffer.size) {
      buffer.release();
      buffer.data = static_cast<char*>(::operator new(bytes, std::align_val_t(kAlignment)));
      buffer.size = bytes;
    }
    next_ = buffer.data;
  }
  ~Scratch() {
    if (mine().size > kKeep) mine().release();
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
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kKeep = size_t(4) << 20;

  struct Buffer {
    char* data = nullptr;
    size_t size = 0;
    void release() {
      ::operator delete(data, std::align_val_t(kAlignment));
      data = nullptr;
      size = 0;
    }
    ~Buffer() { release(); }
  };
  static Buffer& mine() {
    static thread_local Buffer buffer;
    return buffer;
  }

  char* next_;
};

}  // namespace fastflow
