// FASTFLOW_HD marks functions that are compiled for the host and, under nvcc, for the device too.
#pragma once

#if defined(__CUDACC__)
#define FASTFLOW_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTFLOW_HD inline __attribute__((always_inline))
#else
#define FASTFLOW_HD inline
#endif
