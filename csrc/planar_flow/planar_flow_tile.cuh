// The two thin matrix products of a panel of shared steps, on a tile of rows in shared memory.
#pragma once

#include "planar_flow_device.cuh"

namespace fastflow {

constexpr int kTileThreads = 128;
constexpr int kRowGroups = 16;       // threads with different rows; kTileThreads / 16 share one
constexpr int kWidth = 32;           // columns that are staged at once
constexpr int kStride = kWidth + 4;  // of a row in shared memory: whole quads, spread over banks

// A block's tile: 16 kRows rows of the batch and one panel of kPanel steps. Threads share the work
// as (row group, other group): a thread's rows are its group's and every 16th from there.
template <class T, int kRows, int kPanel>
struct Tile {
  static constexpr int kTileRows = kRows * kRowGroups;
  static constexpr int kOtherGroups = kTileThreads / kRowGroups;
  static constexpr int kSteps = kPanel / kOtherGroups;
  static constexpr int kValueStride = kPanel + 1;
  static_assert(kOtherGroups == kWidth / 4);
  static_assert(kValueStride <= kStride);  // the rows' part also holds a scalar a row and step
  static constexpr size_t kSharedBytes =
      sizeof(T) * ((kTileRows + kPanel) * kStride + kTileRows * kValueStride);

  const Chain<T>& chain;
  const int64_t first_row;
  const int rows;  // that exist
  int first = 0;   // visit of the panel
  int count = 0;   // of steps in the panel

  T* const x = shared_memory<T>();         // (kTileRows, kStride)
  T* const y = x + kTileRows * kStride;    // (kPanel, kStride)
  T* const values = y + kPanel * kStride;  // (kTileRows, kValueStride)

  __device__ Tile(const Chain<T>& chain, int64_t first_row)
      : chain(chain),
        first_row(first_row),
        rows(int(smaller<int64_t>(kTileRows, chain.batch - first_row))) {}

  __device__ __forceinline__ int64_t step(int i) const { return chain.step_at(first + i); }

  // Columns [d, d + kWidth) of `count` rows of a matrix into shared memory, zeros after them.
  template <class F>
  __device__ __forceinline__ void stage(T* tile, int tile_rows, int count, const T* matrix, int d,
                                        const F& row_at) const {
    for (int index = threadIdx.x; index < tile_rows * (kWidth / 4); index += kTileThreads) {
      const int row = index / (kWidth / 4), column = index % (kWidth / 4) * 4;
      Quad<T> quad{};
      if (row < count)
        quad = load_quad(matrix + row_at(row) * chain.features + d + column,
                         chain.features - d - column, chain.aligned);
      *reinterpret_cast<Quad<T>*>(tile + row * kStride + column) = quad;
    }
  }

  // values = source matrix^T for matrices (B, D) and (K, D).
  __device__ __forceinline__ void products(const T* source, const T* matrix) const {
    const int row_group = threadIdx.x % kRowGroups, step_group = threadIdx.x / kRowGroups;
    T sums[kRows][kSteps] = {};
    for (int d = 0; d < chain.features; d += kWidth) {
      __syncthreads();
      stage(x, kTileRows, rows, source, d, [&](int row) { return first_row + row; });
      stage(y, kPanel, count, matrix, d, [&](int i) { return step(i); });
      __syncthreads();
      const int width = smaller(kWidth, chain.features - d);
      for (int column = 0; column < width; column += 4) {
        Quad<T> x_quad[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          x_quad[r] = *reinterpret_cast<const Quad<T>*>(x + (row_group + r * kRowGroups) * kStride +
                                                        column);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const Quad<T> y_quad = *reinterpret_cast<const Quad<T>*>(
              y + (step_group + s * kOtherGroups) * kStride + column);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[r][s] += x_quad[r].v[e] * y_quad.v[e];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
        values[(row_group + r * kRowGroups) * kValueStride + step_group + s * kOtherGroups] =
            sums[r][s];
  }

  // target = source + values matrix; a thread has a quad of columns.
  __device__ __forceinline__ void combine(const T* source, T* target, const T* matrix) const {
    const int column = threadIdx.x % kOtherGroups * 4, row_group = threadIdx.x / kOtherGroups;
    for (int d = 0; d < chain.features; d += kWidth) {
      __syncthreads();
      stage(y, kPanel, count, matrix, d, [&](int i) { return step(i); });
      __syncthreads();
      const int left = chain.features - d - column;
      Quad<T> sums[kRows] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = row_group + r * kRowGroups;
        if (row < rows)
          sums[r] = load_quad(source + (first_row + row) * chain.features + d + column, left,
                              chain.aligned);
      }
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const Quad<T> y_quad = *reinterpret_cast<const Quad<T>*>(y + i * kStride + column);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const T value = values[(row_group + r * kRowGroups) * kValueStride + i];
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[r].v[e] += value * y_quad.v[e];
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = row_group + r * kRowGroups;
        if (row < rows)
          store_quad(target + (first_row + row) * chain.features + d + column, sums[r], left,
                     chain.aligned);
      }
    }
  }

  // f(place in a row-and-step array of the tile, place in one of (B, K)) for each row and step.
  template <class F>
  __device__ __forceinline__ void each_scalar(const F& f) const {
    for (int index = threadIdx.x; index < rows * count; index += kTileThreads) {
      const int row = index / count, i = index % count;
      f(row * kValueStride + i, (first_row + row) * chain.steps + step(i));
    }
  }
};

}  // namespace fastflow
