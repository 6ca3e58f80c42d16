// The parallel direction: all layers of a tile of rows in one kernel.
#include "autoregressive_device.cuh"

namespace fastflow {
namespace {

constexpr int kMostThreads = 512;

// Pre-activations of a level from the values of the level below, then its values.
template <class T>
__device__ __forceinline__ void forward_level(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                              int level) {
  const DeviceLayer<T>& layer = net.layers[level - 1];
  const T* const below = tile.at(net.place(level - 1));
  int item = threadIdx.x / 32;
  each_item(tile, 0, layer.rows, item, [&](int u, int r0) {
    T p[kThreadRows];
    const int unit = layer.order[u];
    const T bias = layer.bias ? layer.bias[unit] : T(0);
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int64_t row = tile.first + r0 + r;
      p[r] = bias;
      if (layer.term && row < net.batch) p[r] += layer.term[row * layer.rows + unit];
    }
    contract(layer.packed + u, layer.rows, below + r0, tile.rows, 0, layer.prefix[u], p);
    if (net.residual && level % 2 == 1 && net.hidden(level)) {
      T* const stream = tile.at(net.units + u) + r0;  // P_{l-2}, then P_l
      T before[kThreadRows] = {};
      if (layer.skip) load_rows(stream, before);
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) p[r] += before[r];
      store_rows(stream, p);
    }
    if (net.saved && (net.affine || net.hidden(level)) && r0 < tile.live)
      store_rows(net.saved + net.row_of(level) + u * net.stride + tile.first + r0, p);
    if (!layer.linear)
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) p[r] = activation(net.activation, p[r]);
    store_rows(tile.at(layer.place + u) + r0, p);
  });
}

// y, and l = log s in place of the raw scales.
template <class T>
__device__ __forceinline__ void affine_step(const DeviceNetwork<T>& net, const RowTile<T>& tile) {
  const int outputs = net.place(net.layer_count);
  const int32_t* const order = net.layers[0].column_order;
  tile.each_by_unit(net.features, [&](int k, int r) {
    const T m = tile.at(outputs + 2 * k)[r];
    T* const a = tile.at(outputs + 2 * k + 1) + r;
    const LogScale<T> scale = log_scale(net.scale, *a, net.c0, net.c1);
    const T shift = net.scale == Scale::gate ? scale.complement * m : m;
    if (r < tile.live)
      net.y[(tile.first + r) * net.features + order[k]] = exp(scale.l) * tile.at(k)[r] + shift;
    *a = scale.l;
  });
  __syncthreads();
  for (int r = threadIdx.x / 32; r < tile.live; r += blockDim.x / 32) {
    T sum[1] = {0};
    for (int k = threadIdx.x % 32; k < net.features; k += 32)
      sum[0] += tile.at(outputs + 2 * k + 1)[r];
    group_sum<32>(sum, static_cast<T*>(nullptr), 0);
    if (threadIdx.x % 32 == 0) net.ladj[tile.first + r] = sum[0];
  }
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 1)
    forward_kernel(const __grid_constant__ DeviceNetwork<T> net) {
  const RowTile<T> tile(net, shared_memory<T>());
  const int32_t* const order = net.layers[0].column_order;
  tile.each_by_unit(net.features, [&](int k, int r) {
    const int64_t at = (tile.first + r) * net.features + order[k];
    tile.at(k)[r] = r < tile.live ? net.x[at] : T(0);
  });
  for (int level = 1; level <= net.layer_count; ++level) {
    __syncthreads();
    forward_level(net, tile, level);
  }
  __syncthreads();
  if (net.affine) {
    affine_step(net, tile);
    return;
  }
  const DeviceLayer<T>& last = net.layers[net.layer_count - 1];
  tile.each_by_unit(last.rows, [&](int u, int r) {
    if (r < tile.live)
      net.y[(tile.first + r) * last.rows + last.order[u]] = tile.at(last.place + u)[r];
  });
}

}  // namespace

template <class T>
void launch_forward(const DeviceNetwork<T>& net, Stream& stream) {
  stream.launch(forward_kernel<T>, net.blocks(), net.threads, net.tile_bytes(), net);
}

template void launch_forward(const DeviceNetwork<float>&, Stream&);
template void launch_forward(const DeviceNetwork<double>&, Stream&);

}  // namespace fastflow
