// Backward of the parallel direction: cotangents of all pre-activations of a tile of rows, and of
// x, in one kernel.
#include "autoregressive_device.cuh"

namespace fastflow {
namespace {

constexpr int kMostThreads = 512;

// The cotangents of the outputs, and for affine ops the part of dx that does not pass through the
// network, from that of the result.
template <class T>
__device__ __forceinline__ void load_cotangents(const DeviceNetwork<T>& net,
                                                const RowTile<T>& tile) {
  const DeviceLayer<T>& last = net.layers[net.layer_count - 1];
  if (!net.affine) {
    tile.each_by_unit(last.rows, [&](int u, int r) {
      const int64_t at = (tile.first + r) * last.rows + last.order[u];
      tile.at(last.place + u)[r] = r < tile.live ? net.d_out[at] : T(0);
    });
    return;
  }
  const int32_t* const order = net.layers[0].column_order;
  tile.each_by_unit(net.features, [&](int k, int r) {
    const int64_t at = (tile.first + r) * net.features + order[k];
    tile.at(k)[r] = r < tile.live ? net.d_out[at] : T(0);
    tile.at(last.place + 2 * k)[r] = r < tile.live ? net.x[at] : T(0);
  });
  __syncthreads();
  const T* const outputs = net.saved + net.row_of(net.layer_count) + tile.first;
  tile.each_by_row(net.features, [&](int k, int r) {
    const bool live = r < tile.live;
    const T m = live ? outputs[2 * k * net.stride + r] : T(0);
    const T a = live ? outputs[(2 * k + 1) * net.stride + r] : T(0);
    const T d_ladj = live ? net.d_ladj[tile.first + r] : T(0);
    T& dx = tile.at(k)[r];
    T& dm = tile.at(last.place + 2 * k)[r];  // holds x
    const bool gate = net.scale == Scale::gate;
    const LogScale<T> scale = log_scale(net.scale, a, net.c0, net.c1);
    const T dy = dx, from = gate ? dm - m : dm;
    dx = exp(scale.l) * dy;
    dm = gate ? scale.complement * dy : dy;
    tile.at(last.place + 2 * k + 1)[r] = (dx * from + d_ladj) * scale.slope;
  });
}

// Cotangents of a level's pre-activations (of x at level 0) from those of the level above.
template <class T>
__device__ __forceinline__ void backward_level(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                               int level) {
  const DeviceLayer<T>& above = net.layers[level];
  int item = threadIdx.x / 32;
  each_item(tile, 0, above.columns, item, [&](int k, int r0) {
    T d[kThreadRows] = {};
    T* const own = tile.at(net.place(level) + k) + r0;
    if (level == 0 && net.affine) load_rows(own, d);
    contract(above.packed + k, above.columns, tile.at(above.place) + r0, tile.rows, above.start[k],
             above.rows, d);
    if (level && !net.layers[level - 1].linear) {
      T p[kThreadRows] = {};
      if (r0 < tile.live)
        load_rows(net.saved + net.row_of(level) + k * net.stride + tile.first + r0, p);
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) d[r] *= activation_slope(net.activation, p[r]);
    }
    if (level && net.skips(level + 2)) {
      T skipped[kThreadRows];
      load_rows(tile.at(net.place(level + 2) + k) + r0, skipped);
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) d[r] += skipped[r];
    }
    store_rows(own, d);
    if (level && net.cotangents && r0 < tile.live)
      store_rows(net.cotangents + net.row_of(level) + k * net.stride + tile.first + r0, d);
  });
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 1)
    backward_kernel(const __grid_constant__ DeviceNetwork<T> net) {
  const RowTile<T> tile(net, shared_memory<T>());
  load_cotangents(net, tile);
  __syncthreads();
  if (net.cotangents) {
    T* const d_outputs = net.cotangents + net.row_of(net.layer_count) + tile.first;
    tile.each_by_row(net.width(net.layer_count), [&](int u, int r) {
      if (r < tile.live) d_outputs[u * net.stride + r] = tile.at(net.place(net.layer_count) + u)[r];
    });
  }
  for (int level = net.layer_count - 1; level >= (net.d_in ? 0 : 1); --level) {
    backward_level(net, tile, level);
    __syncthreads();
  }
  if (!net.d_in) return;
  const int32_t* const order = net.layers[0].column_order;
  tile.each_by_unit(net.features, [&](int k, int r) {
    if (r < tile.live) net.d_in[(tile.first + r) * net.features + order[k]] = tile.at(k)[r];
  });
}

}  // namespace

template <class T>
void launch_backward(const DeviceNetwork<T>& net, Stream& stream) {
  stream.launch(backward_kernel<T>, net.blocks(), net.threads, net.tile_bytes(), net);
}

template void launch_backward(const DeviceNetwork<float>&, Stream&);
template void launch_backward(const DeviceNetwork<double>&, Stream&);

}  // namespace fastflow
