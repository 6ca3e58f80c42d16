// The network of a call as the CUDA kernels see it: sorted, with its tables in device memory.
#pragma once

#include "../common/device.cuh"
#include "autoregressive_math.cuh"

namespace fastflow {

constexpr int kMostLayers = 24;  // what a kernel's arguments hold
constexpr int kThreadRows = 8;   // of a batch, in the registers of a thread

// Stages of a sweep are taken together in panels of so many stages, units and weights between them.
constexpr int kPanelStages = 16;
constexpr int kPanelUnits = 256;
constexpr int kPanelWeights = 4096;

// Layer l = 1 .. L+1, from level l-1 to level l. Units are numbered in sorted order, except in what
// the caller's pointers lead to.
template <class T>
struct DeviceLayer {
  int rows;     // n_l
  int columns;  // n_{l-1}
  int place;    // units of all levels below level l
  bool skip;    // P_{l-2} is added (residual)
  bool linear;  // no activation follows

  const int32_t* order;         // (rows)
  const int32_t* prefix;        // (rows): unit u reads columns 0 .. prefix[u] - 1
  const int32_t* column_order;  // (columns)
  int32_t* start;               // (columns): column k is read by units start[k] .. rows - 1

  // The weights in sorted order, so that neighbouring threads read neighbouring weights: (columns,
  // rows) in the forward direction and (rows, columns) backward. Unset where masked.
  T* packed;

  const T* weight;  // (rows, columns)
  const T* bias;    // (rows) or null
  const T* term;    // (B, rows) or null
  T* dweight;
  T* dbias;
  T* dterm;
};

// Level 0 is x, L+1 the outputs. Stage s = 0 .. D of a sweep computes the hidden units that see
// features 0 .. s-1 only, then outputs 2s and 2s+1, then feature s.
template <class T>
struct DeviceNetwork {
  int features;
  int layer_count;  // L + 1
  int units;        // of all levels together, x and outputs included
  int tile_units;   // of a block's tile: these and what a pass keeps beside them
  int tile_rows;    // of a block, a multiple of kThreadRows
  int threads;      // of a block
  bool on_chip;     // a block's tile is in shared memory
  bool wide;        // a kernel for each layer: the batch is a single tile, (units, stride)
  bool affine;
  bool residual;
  Activation activation;
  Scale scale;
  T c0;
  T c1;
  int64_t batch;
  int64_t stride;  // batch, rounded up to kThreadRows

  T* x;      // (B, D)
  T* y;      // (B, n_{L+1}), affine: (B, D)
  T* ladj;   // (B)
  T* saved;  // (units - D, stride): P_1 .. P_L and, if affine, the outputs
  const T* d_out;
  const T* d_ladj;
  T* d_in;  // (B, D)

  int32_t* ends;    // (L + 2, D + 2): see end()
  int32_t* panels;  // (D + 2): see prepare_kernel
  T* tiles;         // (blocks, tile_units, tile_rows), if not on chip
  T* cotangents;    // (units - D, stride): of P_1 .. P_L and of the outputs
  T* partial;       // (pieces, weights of all layers): of the weights' gradients

  DeviceLayer<T> layers[kMostLayers];

  unsigned blocks() const { return unsigned(divide_up<int64_t>(batch, tile_rows)); }
  __host__ __device__ size_t tile_elements() const {
    return on_chip ? size_t(tile_units) * tile_rows : 0;
  }
  size_t tile_bytes() const { return tile_elements() * sizeof(T); }
  __host__ __device__ int levels() const { return layer_count + 1; }
  __host__ __device__ int width(int level) const {
    return level ? layers[level - 1].rows : features;
  }
  __host__ __device__ int place(int level) const { return level ? layers[level - 1].place : 0; }
  __device__ bool hidden(int level) const { return level < layer_count; }
  // Whether P_{level - 2} is a part of P_level.
  __device__ bool skips(int level) const { return level <= layer_count && layers[level - 1].skip; }
  // How many units of a level there are after stage s, which may be -1.
  __device__ int end(int level, int s) const { return ends[level * (features + 2) + s + 1]; }
  // Where unit 0 of a level > 0 is in `saved` and in `cotangents`.
  __device__ int64_t row_of(int level) const {
    return int64_t(layers[level - 1].place - features) * stride;
  }
};

// A block's rows of the batch: values of every unit, (units, rows), and how many rows there are.
template <class T>
struct RowTile {
  T* values;
  int rows;
  int live;
  int64_t first;

  __device__ RowTile(const DeviceNetwork<T>& net, T* shared)
      : rows(net.tile_rows), first(int64_t(blockIdx.x) * net.tile_rows) {
    live = int(smaller<int64_t>(rows, net.batch - first));
    values = net.on_chip ? shared : net.tiles + int64_t(blockIdx.x) * net.tile_units * rows;
  }
  __device__ T* at(int unit) const { return values + int64_t(unit) * rows; }

  // f(k, r) for k < count and all rows, by the threads of the block: neighbours in k (a batch
  // tensor) or in r (a tile, `saved`).
  template <class F>
  __device__ __forceinline__ void each_by_unit(int count, const F& f) const {
    for (int i = threadIdx.x; i < count * rows; i += blockDim.x) f(i % count, i / count);
  }
  template <class F>
  __device__ __forceinline__ void each_by_row(int count, const F& f) const {
    for (int i = threadIdx.x; i < count * rows; i += blockDim.x) f(i / rows, i % rows);
  }
};

// f(unit, row) for units begin .. end - 1 of the warp's lanes and the first of kThreadRows rows
// each, by all warps of the block. `item` counts the warps' items over several calls, so that one
// call begins at the warp where the last one ended.
template <class T, class F>
__device__ __forceinline__ void each_item(const RowTile<T>& tile, int begin, int end, int& item,
                                          const F& f) {
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int groups = tile.rows / kThreadRows, count = divide_up(end - begin, 32) * groups;
  for (; item < count; item += warps) {
    const int unit = begin + item / groups * 32 + lane;
    if (unit < end) f(unit, item % groups * kThreadRows);
  }
  if (end > begin) item -= count;
}

template <class T>
__device__ __forceinline__ void load_rows(const T* from, T (&rows)[kThreadRows]) {
#pragma unroll
  for (int q = 0; q < kThreadRows; q += 4) {
    const Quad<T> quad = load_quad(from + q, 4, true);
#pragma unroll
    for (int e = 0; e < 4; ++e) rows[q + e] = quad.v[e];
  }
}

template <class T>
__device__ __forceinline__ void store_rows(T* to, const T (&rows)[kThreadRows]) {
#pragma unroll
  for (int q = 0; q < kThreadRows; q += 4)
    store_quad(to + q, Quad<T>{{rows[q], rows[q + 1], rows[q + 2], rows[q + 3]}}, 4, true);
}

// sums[r] += sum of w[k * stride] a[k * rows + r] over begin <= k < end, in this order: the result
// does not depend on how the range is cut into calls.
template <class T>
__device__ __forceinline__ void contract(const T* w, int stride, const T* a, int rows, int begin,
                                         int end, T (&sums)[kThreadRows]) {
  constexpr int kAhead = 4;  // weights on their way at once
  w += int64_t(begin) * stride;
  a += int64_t(begin) * rows;
  int left = end - begin;
  for (; left >= kAhead; left -= kAhead) {
    T weights[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) weights[i] = w[int64_t(i) * stride];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      T values[kThreadRows];
      load_rows(a + int64_t(i) * rows, values);
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) sums[r] += weights[i] * values[r];
    }
    w += int64_t(kAhead) * stride;
    a += int64_t(kAhead) * rows;
  }
  for (; left > 0; --left, w += stride, a += rows) {
    T values[kThreadRows];
    load_rows(a, values);
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) sums[r] += *w * values[r];
  }
}

// What each kind of kernel launches; grid and shared memory follow from the network.
template <class T>
void launch_prepare(const DeviceNetwork<T>& net, bool backward, Stream& stream);
template <class T>
void launch_forward(const DeviceNetwork<T>& net, Stream& stream);
template <class T>
void launch_backward(const DeviceNetwork<T>& net, Stream& stream);
template <class T>
void launch_wide_forward(const DeviceNetwork<T>& net, Stream& stream);
template <class T>
void launch_wide_backward(const DeviceNetwork<T>& net, Stream& stream);
template <class T>
void launch_inverse(const DeviceNetwork<T>& net, Stream& stream);
template <class T>
void launch_inverse_backward(const DeviceNetwork<T>& net, Stream& stream);
// Into how many pieces launch_gradients cuts the batch.
template <class T>
int gradient_pieces(const DeviceNetwork<T>& net, int64_t processors);
template <class T>
void launch_gradients(const DeviceNetwork<T>& net, int pieces, Stream& stream);

}  // namespace fastflow
