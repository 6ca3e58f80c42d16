// What every kernel uses: launches on a stream, shared memory, rows in registers, sums over
// threads.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fastflow {

extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];

// The block's dynamic shared memory, from its start.
template <class T>
__device__ T* shared_memory() {
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

constexpr size_t kSharedUnasked = 48 << 10;  // bytes a block gets without asking

// Launches kernels one after another on a stream; after an error it launches none.
class Stream {
 public:
  explicit Stream(cudaStream_t stream) : stream_(stream) {}

  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), dim3 grid, int block, size_t shared_bytes,
              const Args&... args) {
    if (error_ != cudaSuccess) return;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(unsigned(block));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    if (shared_bytes > kSharedUnasked)
      error_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shared_bytes));
    if (error_ == cudaSuccess) error_ = cudaLaunchKernelEx(&config, kernel, args...);
  }

  // nullptr, or the text of the first error.
  const char* error() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

template <class T>
__host__ __device__ constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}

// Four neighbours of a row: one 16-byte access (two for double) where the row allows it.
template <class T>
struct alignas(16) Quad {
  T v[4];
};

// `left` elements of the row remain from p on; what lies beyond reads as zero. `aligned` says that
// every quad of the row is whole and on a 16-byte boundary.
template <class T>
__device__ __forceinline__ Quad<T> load_quad(const T* p, int left, bool aligned) {
  Quad<T> quad{};
  if (aligned) {
    if (left > 0) quad = *reinterpret_cast<const Quad<T>*>(p);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < left) quad.v[e] = p[e];
  }
  return quad;
}

template <class T>
__device__ __forceinline__ void store_quad(T* p, const Quad<T>& quad, int left, bool aligned) {
  if (aligned) {
    if (left > 0) *reinterpret_cast<Quad<T>*>(p) = quad;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < left) p[e] = quad.v[e];
  }
}

constexpr int kMostSums = 4;  // of a call of group_sum

// Replaces each sum by its total over groups of kLanes threads (a power of 2), the same bits in
// every thread of a group. Every thread of the block takes part.
//
// Groups of more than a warp are the whole block and exchange through `scratch`. Consecutive calls
// use its halves in turn (`turn` counts the calls), so that one barrier per call is enough: the
// halves do not depend on how many sums a call has.
template <int kLanes, int kCount, class T>
__device__ __forceinline__ void group_sum(T (&sums)[kCount], T* scratch, int turn) {
#pragma unroll
  for (int lanes = kLanes < 32 ? kLanes / 2 : 16; lanes > 0; lanes /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], lanes);
  if constexpr (kLanes > 32) {
    constexpr int kWarps = kLanes / 32;
    static_assert(kCount <= kMostSums);
    scratch += turn % 2 * (kMostSums * kWarps);
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int i = 0; i < kCount; ++i) scratch[i * kWarps + threadIdx.x / 32] = sums[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sums[i] = scratch[i * kWarps];
      for (int warp = 1; warp < kWarps; ++warp) sums[i] += scratch[i * kWarps + warp];
    }
  }
}

// Bytes of the scratch of group_sum.
template <class T>
constexpr size_t group_sum_bytes(int lanes) {
  return lanes > 32 ? 2 * kMostSums * size_t(lanes / 32) * sizeof(T) : 0;
}

}  // namespace fastflow
