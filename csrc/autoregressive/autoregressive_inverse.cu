// The inverse of an affine autoregressive layer: one sweep over the features.
//
// Right-looking: what has become known is added at once to the sums of everything later. So every
// sum takes its products in the order of the units below, however stages are cut into panels.
#include "autoregressive_sweep.cuh"

namespace fastflow {
namespace {

// y in place of x; biases and terms in place of all pre-activations.
template <class T>
__device__ __forceinline__ void load_start(const DeviceNetwork<T>& net, const RowTile<T>& tile) {
  const int32_t* const order = net.layers[0].column_order;
  tile.each_by_unit(net.features, [&](int k, int r) {
    const int64_t at = (tile.first + r) * net.features + order[k];
    tile.at(k)[r] = r < tile.live ? net.y[at] : T(0);
  });
  for (int l = 0; l < net.layer_count; ++l) {
    const DeviceLayer<T>& layer = net.layers[l];
    tile.each_by_unit(layer.rows, [&](int u, int r) {
      const int unit = layer.order[u];
      T p = layer.bias ? layer.bias[unit] : T(0);
      if (layer.term && r < tile.live) p += layer.term[(tile.first + r) * layer.rows + unit];
      tile.at(layer.place + u)[r] = p;
    });
  }
}

// Adds columns k0 .. k1 - 1 of a layer to units u0 and later.
template <class T>
__device__ __forceinline__ void add_columns(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                            int level, int k0, int k1, int u0, int& item) {
  const DeviceLayer<T>& layer = net.layers[level - 1];
  const T* const below = tile.at(net.place(level - 1));
  each_item(tile, u0, layer.rows, item, [&](int u, int r0) {
    const int seen = smaller(k1, layer.prefix[u]);
    if (seen <= k0) return;
    T p[kThreadRows];
    T* const own = tile.at(layer.place + u) + r0;
    load_rows(own, p);
    contract(layer.packed + u, layer.rows, below + r0, tile.rows, k0, seen, p);
    store_rows(own, p);
  });
}

// Feature s of a row: x in place of y; returns l.
template <class T>
__device__ __forceinline__ T step_back(const DeviceNetwork<T>& net, T m, T a, T* x) {
  const LogScale<T> scale = log_scale(net.scale, a, net.c0, net.c1);
  const T from_shift = (*x - m) * exp(-scale.l);
  *x = net.scale == Scale::gate ? from_shift + m : from_shift;
  return scale.l;
}

// One row through stages first .. last - 1, by a warp.
template <class T>
__device__ __forceinline__ void sweep_row(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                          const Panel<T>& panel, int first, int last, int row) {
  const int lane = threadIdx.x % 32, outputs = net.layer_count;
  T* const work = panel.work + row * kPanelUnits;
  for (int level = 1; level <= outputs; ++level) {
    const PanelLevel at = panel.level[level];
    for (int i = lane; i < at.width(); i += 32)
      work[at.local + i] = tile.at(net.place(level) + at.begin + i)[row];
  }
  __syncwarp();
  for (int s = first; s < last; ++s) {
    for (int level = 1; level <= outputs; ++level) {
      const PanelLevel at = panel.level[level], below = panel.level[level - 1];
      const DeviceLayer<T>& layer = net.layers[level - 1];
      // The newest feature is that of the stage before.
      const int k0 = level == 1 ? (s > first ? s - 1 : s) : panel.mark(level - 1, s - 1, first);
      const int k1 = level == 1 ? s : panel.mark(level - 1, s, first);
      const int known = panel.mark(level, s, first);
      const T* const a = tile.at(net.place(level - 1)) + row;
      for (int u = panel.mark(level, s - 1, first) + lane; u < at.end; u += 32) {
        const int i = u - at.begin, seen = smaller(k1, panel.bounds[at.local + i]);
        const T* const w = panel.diagonal + at.diagonal + i;
        T p = work[at.local + i];
        for (int k = k0; k < seen; ++k) p += w[(k - below.begin) * at.width()] * a[k * tile.rows];
        work[at.local + i] = p;
        if (level == outputs || u >= known) continue;
        if (net.skips(level + 2)) {  // to a unit of the same degree, so of this stage too
          const PanelLevel above = panel.level[level + 2];
          work[above.local + u - above.begin] += p;
        }
        tile.at(layer.place + u)[row] = layer.linear ? p : activation(net.activation, p);
      }
      __syncwarp();
    }
    if (s == net.features) break;
    if (lane == 0) {
      const T* const out = work + panel.level[outputs].local + 2 * (s - first);
      panel.ladj[row] -= step_back(net, out[0], out[1], tile.at(s) + row);
    }
    __syncwarp();
  }
}

template <class T>
__device__ __forceinline__ void save(const DeviceNetwork<T>& net, const RowTile<T>& tile, int level,
                                     int u, int r, T p) {
  if (net.saved && r < tile.live)
    net.saved[net.row_of(level) + u * net.stride + tile.first + r] = p;
}

// Saves the panel's pre-activations and adds what it found to all later units. Other threads may be
// loading the next panel: nothing of this one but `work` is left.
template <class T>
__device__ __forceinline__ void finish_panel(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                             const Panel<T>& panel, int first, int last) {
  int item = threadIdx.x / 32, local = net.end(0, last - 1) - net.end(0, first - 1);
  for (int level = 1; level <= net.layer_count; ++level) {
    const int begin = net.end(level, first - 1), end = net.end(level, last - 1);
    tile.each_by_row(end - begin, [&](int i, int r) {
      save(net, tile, level, begin + i, r, panel.work[r * kPanelUnits + local + i]);
    });
    local += end - begin;
    add_columns(net, tile, level, net.end(level - 1, first - 1), net.end(level - 1, last - 1), end,
                item);
  }
}

// Stage s by all threads together: for stages of more units than a panel takes.
template <class T>
__device__ __forceinline__ void wide_stage(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                           const Panel<T>& panel, int s) {
  __syncthreads();
  for (int level = 1; level <= net.layer_count; ++level) {
    const DeviceLayer<T>& layer = net.layers[level - 1];
    const int begin = net.end(level, s - 1), end = net.end(level, s);
    if (level > 1) {
      int item = threadIdx.x / 32;
      add_columns(net, tile, level, net.end(level - 1, s - 1), net.end(level - 1, s), begin, item);
      __syncthreads();
    }
    tile.each_by_row(end - begin, [&](int i, int r) {
      T& p = tile.at(layer.place + begin + i)[r];
      save(net, tile, level, begin + i, r, p);
      if (net.skips(level + 2)) tile.at(net.place(level + 2) + begin + i)[r] += p;
      if (!layer.linear) p = activation(net.activation, p);
    });
    __syncthreads();
  }
  if (s == net.features) return;
  for (int r = threadIdx.x; r < tile.live; r += blockDim.x) {
    const int out = net.place(net.layer_count) + 2 * s;
    panel.ladj[r] -= step_back(net, tile.at(out)[r], tile.at(out + 1)[r], tile.at(s) + r);
  }
  __syncthreads();
  int item = threadIdx.x / 32;
  add_columns(net, tile, 1, s, s + 1, net.end(1, s), item);
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads, 1)
    inverse_kernel(const __grid_constant__ DeviceNetwork<T> net) {
  T* const shared = shared_memory<T>();
  const RowTile<T> tile(net, shared);
  const Panel<T> panel(net, false, shared + net.tile_elements());
  load_start(net, tile);
  for (int r = threadIdx.x; r < tile.rows; r += blockDim.x) panel.ladj[r] = T(0);
  for (int s = 0; s <= net.features;) {
    const int next = net.panels[s];
    if (next < 0) {
      wide_stage(net, tile, panel, s++);
      continue;
    }
    panel.template load<false>(net, s, next);
    __syncthreads();
    for (int row = threadIdx.x / 32; row < tile.live; row += blockDim.x / 32)
      sweep_row(net, tile, panel, s, next, row);
    __syncthreads();
    finish_panel(net, tile, panel, s, next);
    s = next;
  }
  __syncthreads();
  const int32_t* const order = net.layers[0].column_order;
  tile.each_by_unit(net.features, [&](int k, int r) {
    if (r < tile.live) net.x[(tile.first + r) * net.features + order[k]] = tile.at(k)[r];
  });
  for (int r = threadIdx.x; r < tile.live; r += blockDim.x)
    net.ladj[tile.first + r] = panel.ladj[r];
}

}  // namespace

template <class T>
void launch_inverse(const DeviceNetwork<T>& net, Stream& stream) {
  stream.launch(inverse_kernel<T>, net.blocks(), net.threads,
                net.tile_bytes() + Panel<T>::bytes(net.tile_rows, net.levels(), false), net);
}

template void launch_inverse(const DeviceNetwork<float>&, Stream&);
template void launch_inverse(const DeviceNetwork<double>&, Stream&);

}  // namespace fastflow
