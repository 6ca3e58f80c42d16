// Stands in for CUDA's header so that a C++ compiler can build .cu files for the host, where
// cuda_shim.cpp executes their kernels. Covers what the kernels use: indices, shared memory,
// barriers, warp shuffles and cudaLaunchKernelEx. Kernels see one memory, as on a GPU, but
// every thread is a fiber and may be stopped only where CUDA lets threads wait for each other.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ \
  thread_local  // static inside functions, may be extern; all fibers share a thread

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorLaunchFailure
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_shim {

enum class WarpCall { kSync, kShuffle };

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function,
                   const std::function<void()>& kernel);
cudaError_t allow_shared(const void* function, int bytes);
void sync_threads();
// Waits for all lanes of the mask; returns the value that lane `source` brought.
uint64_t meet_warp(WarpCall call, unsigned mask, uint64_t value, int source);
int lane();

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(WarpCall::kShuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_shim

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  return cuda_shim::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  return cuda_shim::launch(*config, reinterpret_cast<const void*>(kernel),
                           [&] { kernel(args...); });
}

inline void __syncthreads() { cuda_shim::sync_threads(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_shim::meet_warp(cuda_shim::WarpCall::kSync, mask, 0, cuda_shim::lane());
}

// A source outside the lane's segment of `width` lanes gives the lane's own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int start = cuda_shim::lane() / width * width;
  return cuda_shim::shuffle(mask, value, start + (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = cuda_shim::lane(), source = lane ^ lanes;
  return cuda_shim::shuffle(mask, value, source / width > lane / width ? lane : source);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_shim::lane(), source = lane + int(delta);
  return cuda_shim::shuffle(mask, value, source / width == lane / width ? source : lane);
}
