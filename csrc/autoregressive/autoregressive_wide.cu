// Both passes of the parallel direction for layers that fill a GPU by themselves: a masked product
// for each layer. Values lie as (units, stride), the batch along rows, like `saved`.
#include "autoregressive_device.cuh"

namespace fastflow {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // units by rows of the batch, 4 x 4 for each thread
constexpr int kDepth = 16;  // units of the other level at once
constexpr int kLoads = kTile * kDepth / kThreads;
constexpr int kSquare = 32;

enum class Exchange { load, store };

// Between a batch tensor (B, n) and values (n, stride), whose rows past the batch become zero.
template <class T>
__global__ void __launch_bounds__(kThreads)
    exchange_kernel(T* tensor, T* values, const int32_t* order, int n, int64_t batch,
                    int64_t stride, Exchange direction) {
  __shared__ T square[kSquare][kSquare + 1];
  const int lane = threadIdx.x % kSquare;
  const int64_t b0 = int64_t(blockIdx.x) * kSquare;
  const int k0 = blockIdx.y * kSquare;
  const bool load = direction == Exchange::load;
  for (int y = threadIdx.x / kSquare; y < kSquare; y += kThreads / kSquare) {
    const int64_t b = load ? b0 + y : b0 + lane;
    const int k = load ? k0 + lane : k0 + y;
    T value = 0;
    if (b < batch && k < n) value = load ? tensor[b * n + order[k]] : values[k * stride + b];
    square[y][lane] = value;
  }
  __syncthreads();
  for (int y = threadIdx.x / kSquare; y < kSquare; y += kThreads / kSquare) {
    const int64_t b = load ? b0 + lane : b0 + y;
    const int k = load ? k0 + y : k0 + lane;
    if (k >= n) continue;
    if (load && b < stride) values[k * stride + b] = square[lane][y];
    if (!load && b < batch) tensor[b * n + order[k]] = square[lane][y];
  }
}

// A layer's weights as a product reads them: w(step, unit) at packed[step * units + unit]; a unit
// reads steps below its bound, backward those from its bound on.
template <class T>
struct Product {
  const T* packed;
  int units;
  int steps;
  const int32_t* bounds;
  const T* from;  // (steps, stride)
  T* to;          // (units, stride)
  int64_t stride;
};

// to += w from, for one tile: sums[i][j] is that of unit u0 + 4 (t / 16) + i, row 4 (t % 16) + j.
template <bool kBackward, class T>
__device__ __forceinline__ void multiply(const Product<T>& product, int u0, int64_t b0,
                                         T (&sums)[4][4]) {
  __shared__ __align__(16) T weights[kDepth][kTile], values[kDepth][kTile];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, column = threadIdx.x % kTile;
  const int last = smaller(u0 + kTile, product.units) - 1;
  const int begin = kBackward ? product.bounds[u0] : 0;
  const int end = kBackward ? product.steps : product.bounds[last];
  // Steps from `whole_begin` to `whole_end` are read by every unit of the tile.
  const int whole_begin = kBackward ? product.bounds[last] : 0;
  const int whole_end = kBackward ? product.steps : product.bounds[u0];
  int bounds[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bounds[i] = product.bounds[smaller(u0 + 4 * ty + i, last)];
  T next_weights[kLoads], next_values[kLoads];
  const auto fetch = [&](int step0) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t step = step0 + int(threadIdx.x) / kTile + i * (kThreads / kTile);
      const bool inside = step < end;
      next_weights[i] = inside && u0 + column < product.units
                            ? product.packed[step * product.units + u0 + column]
                            : T(0);
      next_values[i] = inside && b0 + column < product.stride
                           ? product.from[step * product.stride + b0 + column]
                           : T(0);
    }
  };
  fetch(begin);
  for (int step0 = begin; step0 < end; step0 += kDepth) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      weights[threadIdx.x / kTile + i * (kThreads / kTile)][column] = next_weights[i];
      values[threadIdx.x / kTile + i * (kThreads / kTile)][column] = next_values[i];
    }
    __syncthreads();
    fetch(step0 + kDepth);  // on its way during the products
    const bool whole = step0 >= whole_begin && step0 + kDepth <= whole_end;
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      const Quad<T> w = load_quad(&weights[k][4 * ty], 4, true);
      const Quad<T> v = load_quad(&values[k][4 * tx], 4, true);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool reads = kBackward ? step0 + k >= bounds[i] : step0 + k < bounds[i];
        if (!whole && !reads) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += w.v[i] * v.v[j];
      }
    }
  }
}

// f(unit, b) for the tile after its sums are in product.to.
template <bool kBackward, class T, class F>
__device__ __forceinline__ void product_tile(const Product<T>& product, const F& f) {
  const int u0 = blockIdx.y * kTile, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t b0 = int64_t(blockIdx.x) * kTile;
  T sums[4][4] = {};
  multiply<kBackward>(product, u0, b0, sums);
  // Written and read again: an activation for each of 16 registers would be a lot of code.
  __shared__ T finished[kTile][kTile];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) finished[4 * ty + i][4 * tx + j] = sums[i][j];
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int u = u0 + i / kTile;
    const int64_t b = b0 + i % kTile;
    if (u < product.units && b < product.stride) f(u, b, finished[i / kTile][i % kTile]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    wide_forward_kernel(const __grid_constant__ DeviceNetwork<T> net, int level) {
  const DeviceLayer<T>& layer = net.layers[level - 1];
  const int64_t below = net.place(level - 1) * net.stride, own = layer.place * net.stride;
  const Product<T> product{layer.packed,      layer.rows,      layer.columns, layer.prefix,
                           net.tiles + below, net.tiles + own, net.stride};
  T* const stream = net.tiles + net.units * net.stride;  // P_{l-2}, then P_l
  product_tile<false>(product, [&](int u, int64_t b, T p) {
    const int unit = layer.order[u];
    const int64_t at = u * net.stride + b;
    if (layer.bias) p += layer.bias[unit];
    if (layer.term && b < net.batch) p += layer.term[b * layer.rows + unit];
    if (net.residual && level % 2 == 1 && net.hidden(level)) {
      if (layer.skip) p += stream[at];
      stream[at] = p;
    }
    if (net.saved && (net.affine || net.hidden(level))) net.saved[net.row_of(level) + at] = p;
    product.to[at] = layer.linear ? p : activation(net.activation, p);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    wide_backward_kernel(const __grid_constant__ DeviceNetwork<T> net, int level) {
  const DeviceLayer<T>& above = net.layers[level];
  const int64_t own = net.place(level) * net.stride;
  const Product<T> product{
      above.packed,    above.columns, above.rows, above.start, net.tiles + above.place * net.stride,
      net.tiles + own, net.stride};
  const bool skipped = level && net.skips(level + 2);
  const T* const skip = net.tiles + (skipped ? net.place(level + 2) : 0) * net.stride;
  product_tile<true>(product, [&](int k, int64_t b, T d) {
    const int64_t at = k * net.stride + b;
    if (level == 0 && net.affine) d += product.to[at];
    if (level && !net.layers[level - 1].linear)
      d *= activation_slope(net.activation, net.saved[net.row_of(level) + at]);
    if (skipped) d += skip[at];
    product.to[at] = d;
  });
}

// y in place of x, and ladj, from the outputs: 32 rows for a block, a lane takes a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    wide_step_kernel(const __grid_constant__ DeviceNetwork<T> net) {
  __shared__ T sums[kThreads / 32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b = int64_t(blockIdx.x) * 32 + lane;
  const T* const outputs = net.tiles + net.place(net.layer_count) * net.stride;
  T sum = 0;
  if (b < net.batch)
    for (int k = warp; k < net.features; k += kThreads / 32) {
      T& x = net.tiles[k * net.stride + b];
      const T m = outputs[2 * k * net.stride + b], a = outputs[(2 * k + 1) * net.stride + b];
      const LogScale<T> scale = log_scale(net.scale, a, net.c0, net.c1);
      x = exp(scale.l) * x + (net.scale == Scale::gate ? scale.complement * m : m);
      sum += scale.l;
    }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp || b >= net.batch) return;
  for (int w = 1; w < kThreads / 32; ++w) sum += sums[w][lane];
  net.ladj[b] = sum;
}

// The cotangents of the outputs, and the part of dx that does not pass through the network, from
// dy, which is in place of dx, and x, which is behind all units.
template <class T>
__global__ void __launch_bounds__(kThreads)
    wide_step_back_kernel(const __grid_constant__ DeviceNetwork<T> net) {
  const int64_t b = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
  if (b >= net.batch) return;
  const int outputs = net.place(net.layer_count);
  const T* const saved = net.saved + net.row_of(net.layer_count) + b;
  const T d_ladj = net.d_ladj[b];
  const bool gate = net.scale == Scale::gate;
  for (int k = threadIdx.x / 32; k < net.features; k += kThreads / 32) {
    const T m = saved[2 * k * net.stride], a = saved[(2 * k + 1) * net.stride];
    const T x = net.tiles[(net.units + k) * net.stride + b];
    const LogScale<T> scale = log_scale(net.scale, a, net.c0, net.c1);
    T* const to = net.tiles + (outputs + 2 * k) * net.stride + b;
    T& d = net.tiles[k * net.stride + b];
    const T dy = d;
    d = exp(scale.l) * dy;
    to[0] = gate ? scale.complement * dy : dy;
    to[net.stride] = (d * (gate ? x - m : x) + d_ladj) * scale.slope;
  }
}

template <class T>
void exchange(const DeviceNetwork<T>& net, const T* tensor, int level, int place,
              Exchange direction, Stream& stream) {
  const DeviceLayer<T>& layer = net.layers[level ? level - 1 : 0];
  const int32_t* const order = level ? layer.order : layer.column_order;
  const int n = net.width(level);
  const dim3 grid(unsigned(divide_up<int64_t>(net.stride, kSquare)),
                  unsigned(divide_up(n, kSquare)));
  stream.launch(exchange_kernel<T>, grid, kThreads, 0, const_cast<T*>(tensor),
                net.tiles + place * net.stride, order, n, net.batch, net.stride, direction);
}

template <class T>
dim3 grid_of(const DeviceNetwork<T>& net, int level) {
  return {unsigned(divide_up<int64_t>(net.stride, kTile)),
          unsigned(divide_up(net.width(level), kTile))};
}

}  // namespace

template <class T>
void launch_wide_forward(const DeviceNetwork<T>& net, Stream& stream) {
  exchange(net, net.x, 0, 0, Exchange::load, stream);
  for (int level = 1; level <= net.layer_count; ++level)
    stream.launch(wide_forward_kernel<T>, grid_of(net, level), kThreads, 0, net, level);
  if (!net.affine) {
    exchange(net, net.y, net.layer_count, net.place(net.layer_count), Exchange::store, stream);
    return;
  }
  const unsigned blocks = unsigned(divide_up<int64_t>(net.batch, 32));
  stream.launch(wide_step_kernel<T>, blocks, kThreads, 0, net);
  exchange(net, net.y, 0, 0, Exchange::store, stream);
}

template <class T>
void launch_wide_backward(const DeviceNetwork<T>& net, Stream& stream) {
  if (net.affine) {
    exchange(net, net.d_out, 0, 0, Exchange::load, stream);
    exchange(net, static_cast<const T*>(net.x), 0, net.units, Exchange::load, stream);
    const unsigned blocks = unsigned(divide_up<int64_t>(net.batch, 32));
    stream.launch(wide_step_back_kernel<T>, blocks, kThreads, 0, net);
  } else {
    exchange(net, net.d_out, net.layer_count, net.place(net.layer_count), Exchange::load, stream);
  }
  for (int level = net.layer_count - 1; level >= (net.d_in ? 0 : 1); --level)
    stream.launch(wide_backward_kernel<T>, grid_of(net, level), kThreads, 0, net, level);
  if (net.d_in) exchange(net, static_cast<const T*>(net.d_in), 0, 0, Exchange::store, stream);
}

template void launch_wide_forward(const DeviceNetwork<float>&, Stream&);
template void launch_wide_forward(const DeviceNetwork<double>&, Stream&);
template void launch_wide_backward(const DeviceNetwork<float>&, Stream&);
template void launch_wide_backward(const DeviceNetwork<double>&, Stream&);

}  // namespace fastflow
