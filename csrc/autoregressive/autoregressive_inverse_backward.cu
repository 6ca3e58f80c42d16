// Backward of the inverse: the sweep in reverse, from the last feature to the first.
//
// Before feature s is visited, everything that it was used for has sent its cotangent. So x_s is
// complete, and with it outputs 2s and 2s+1, and with them the units of stage s from the highest
// level down. What is complete is added at once to the sums of everything before.
#include "autoregressive_sweep.cuh"

namespace fastflow {
namespace {

// What takes a feature's cotangent to those of y, its shift and its raw scale.
template <class T>
struct StepBack {
  T inverse_scale;
  T slope;
  T x;  // gate: x - m
};

template <class T>
__device__ __forceinline__ StepBack<T> step_of(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                               int s, int r) {
  const int64_t row = tile.first + r;
  const T* const out = net.saved + net.row_of(net.layer_count) + row;
  const T m = out[2 * s * net.stride], a = out[(2 * s + 1) * net.stride];
  const T x = net.x[row * net.features + net.layers[0].column_order[s]];
  const LogScale<T> scale = log_scale(net.scale, a, net.c0, net.c1);
  return {exp(-scale.l), scale.slope, net.scale == Scale::gate ? x - m : x};
}

// From the cotangent of x (which becomes that of y) to those of shift and raw scale.
template <class T>
__device__ __forceinline__ void pull_back(const DeviceNetwork<T>& net, const StepBack<T>& step,
                                          T d_ladj, T& d, T& dm, T& da) {
  const T dx = d;
  d = dx * step.inverse_scale;
  dm = net.scale == Scale::gate ? dx - d : -d;
  da = (-dx * step.x - d_ladj) * step.slope;
}

template <class T>
__device__ __forceinline__ T slope_of(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                      int level, int k, int r) {
  if (net.layers[level - 1].linear) return T(1);
  return activation_slope(net.activation,
                          net.saved[net.row_of(level) + k * net.stride + tile.first + r]);
}

// dx, and zeros to which the network's part is added.
template <class T>
__device__ __forceinline__ void load_start(const DeviceNetwork<T>& net, const RowTile<T>& tile) {
  const int32_t* const order = net.layers[0].column_order;
  tile.each_by_unit(net.features, [&](int k, int r) {
    const int64_t at = (tile.first + r) * net.features + order[k];
    tile.at(k)[r] = r < tile.live ? net.d_out[at] : T(0);
  });
  tile.each_by_row(net.units - net.features,
                   [&](int u, int r) { tile.at(net.features + u)[r] = T(0); });
}

// Adds units u0 .. u1 - 1 of level + 1 to units 0 .. end - 1 of a level.
template <class T>
__device__ __forceinline__ void add_units(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                          int level, int u0, int u1, int end, int& item) {
  const DeviceLayer<T>& above = net.layers[level];
  each_item(tile, 0, end, item, [&](int k, int r0) {
    const int begin = u0 > above.start[k] ? u0 : above.start[k];
    if (begin >= u1) return;
    T d[kThreadRows];
    T* const own = tile.at(net.place(level) + k) + r0;
    load_rows(own, d);
    contract(above.packed + k, above.columns, tile.at(above.place) + r0, tile.rows, begin, u1, d);
    store_rows(own, d);
  });
}

template <class T>
__device__ __forceinline__ void load_slopes(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                            const Panel<T>& panel, int first, int last) {
  const int features = net.end(0, last - 1) - first;
  int local = features;
  for (int level = 1; level < net.layer_count; ++level) {
    const int begin = net.end(level, first - 1), count = net.end(level, last - 1) - begin;
    tile.each_by_row(count, [&](int i, int r) {
      if (r < tile.live)
        panel.slopes[r * kPanelUnits + local + i] = slope_of(net, tile, level, begin + i, r);
    });
    local += count;
  }
  tile.each_by_row(features, [&](int i, int r) {
    if (r >= tile.live) return;
    const StepBack<T> step = step_of(net, tile, first + i, r);
    T* const slopes = panel.slopes + r * kPanelUnits;
    slopes[i] = step.x;
    slopes[local + 2 * i] = step.inverse_scale;
    slopes[local + 2 * i + 1] = step.slope;
  });
}

// Adds the units of stage s one level above to the panel's units of a level, and completes those of
// stage s. By a warp.
template <class T>
__device__ __forceinline__ void sweep_level(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                            const Panel<T>& panel, int first, int s, int level,
                                            int row) {
  T* const work = panel.work + row * kPanelUnits;
  const T* const slopes = panel.slopes + row * kPanelUnits;
  const PanelLevel at = panel.level[level], above = panel.level[level + 1];
  const T* const weights = panel.diagonal + above.diagonal;
  const T* const d_above = tile.at(net.place(level + 1)) + row;
  const int u0 = panel.mark(level + 1, s - 1, first), u1 = panel.mark(level + 1, s, first);
  // Feature s comes after the units of stage s.
  const int complete = panel.mark(level, s - 1, first);
  const int end = level ? panel.mark(level, s, first) : complete;
  for (int k = at.begin + int(threadIdx.x % 32); k < end; k += 32) {
    const int i = k - at.begin, start = panel.bounds[at.local + i];
    T d = work[at.local + i];
    for (int u = start > u0 ? start : u0; u < u1; ++u)
      d += weights[(u - above.begin) * at.width() + i] * d_above[u * tile.rows];
    if (k >= complete) {
      d *= slopes[at.local + i];
      if (net.skips(level + 2)) d += tile.at(net.place(level + 2) + k)[row];
      tile.at(net.place(level) + k)[row] = d;
    }
    work[at.local + i] = d;
  }
  __syncwarp();
}

// One row through stages last - 1 .. first, by a warp.
template <class T>
__device__ __forceinline__ void sweep_row(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                          const Panel<T>& panel, int first, int last, int row) {
  const int lane = threadIdx.x % 32, outputs = net.layer_count;
  T* const work = panel.work + row * kPanelUnits;
  const T* const slopes = panel.slopes + row * kPanelUnits;
  const T d_ladj = net.d_ladj[tile.first + row];
  for (int level = 0; level < outputs; ++level) {
    const PanelLevel at = panel.level[level];
    for (int i = lane; i < at.width(); i += 32)
      work[at.local + i] = tile.at(net.place(level) + at.begin + i)[row];
  }
  __syncwarp();
  for (int s = last - 1; s >= first; --s) {
    if (lane == 0 && s < net.features) {
      const int i = s - first, out = panel.level[outputs].local + 2 * i;
      T* const d_out = tile.at(net.place(outputs) + 2 * s) + row;
      pull_back(net, {slopes[out], slopes[out + 1], slopes[i]}, d_ladj, work[i], d_out[0],
                d_out[tile.rows]);
    }
    __syncwarp();
    for (int level = outputs - 1; level >= 0; --level)
      sweep_level(net, tile, panel, first, s, level, row);
  }
}

template <class T>
__device__ __forceinline__ void save(const DeviceNetwork<T>& net, const RowTile<T>& tile, int level,
                                     int begin, int end) {
  if (!net.cotangents) return;
  T* const to = net.cotangents + net.row_of(level) + tile.first;
  tile.each_by_row(end - begin, [&](int i, int r) {
    if (r < tile.live) to[(begin + i) * net.stride + r] = tile.at(net.place(level) + begin + i)[r];
  });
}

// Stores the panel's cotangents and adds them to all units before it. Other threads may be loading
// the next panel: nothing of this one but `work` is left.
template <class T>
__device__ __forceinline__ void finish_panel(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                             const Panel<T>& panel, int first, int last) {
  const int32_t* const order = net.layers[0].column_order;
  const int features = net.end(0, last - 1) - first;
  if (net.d_in)
    tile.each_by_unit(features, [&](int i, int r) {
      if (r < tile.live)
        net.d_in[(tile.first + r) * net.features + order[first + i]] =
            panel.work[r * kPanelUnits + i];
    });
  int item = threadIdx.x / 32;
  for (int level = 1; level <= net.layer_count; ++level) {
    const int begin = net.end(level, first - 1), end = net.end(level, last - 1);
    save(net, tile, level, begin, end);
    add_units(net, tile, level - 1, begin, end, net.end(level - 1, first - 1), item);
  }
}

// Stage s by all threads together: for stages of more units than a panel takes.
template <class T>
__device__ __forceinline__ void wide_stage(const DeviceNetwork<T>& net, const RowTile<T>& tile,
                                           int s) {
  __syncthreads();
  const int outputs = net.layer_count;
  if (s < net.features)
    for (int r = threadIdx.x; r < tile.live; r += blockDim.x) {
      T& d = tile.at(s)[r];
      T* const d_out = tile.at(net.place(outputs) + 2 * s) + r;
      pull_back(net, step_of(net, tile, s, r), net.d_ladj[tile.first + r], d, d_out[0],
                d_out[tile.rows]);
      if (net.d_in) net.d_in[(tile.first + r) * net.features + net.layers[0].column_order[s]] = d;
    }
  __syncthreads();
  save(net, tile, outputs, net.end(outputs, s - 1), net.end(outputs, s));
  for (int level = outputs - 1; level >= 0; --level) {
    const int begin = net.end(level, s - 1), end = level ? net.end(level, s) : begin;
    int item = threadIdx.x / 32;
    add_units(net, tile, level, net.end(level + 1, s - 1), net.end(level + 1, s), end, item);
    if (level == 0) return;
    __syncthreads();
    tile.each_by_row(end - begin, [&](int i, int r) {
      T& d = tile.at(net.place(level) + begin + i)[r];
      if (r < tile.live) d *= slope_of(net, tile, level, begin + i, r);
      if (net.skips(level + 2)) d += tile.at(net.place(level + 2) + begin + i)[r];
    });
    __syncthreads();
    save(net, tile, level, begin, end);
  }
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads, 1)
    inverse_backward_kernel(const __grid_constant__ DeviceNetwork<T> net) {
  T* const shared = shared_memory<T>();
  const RowTile<T> tile(net, shared);
  const Panel<T> panel(net, true, shared + net.tile_elements());
  load_start(net, tile);
  for (int last = net.features + 1; last > 0;) {
    const int first = net.panels[last];
    if (first < 0) {
      wide_stage(net, tile, --last);
      continue;
    }
    panel.template load<true>(net, first, last);
    load_slopes(net, tile, panel, first, last);
    __syncthreads();
    for (int row = threadIdx.x / 32; row < tile.live; row += blockDim.x / 32)
      sweep_row(net, tile, panel, first, last, row);
    __syncthreads();
    finish_panel(net, tile, panel, first, last);
    last = first;
  }
}

}  // namespace

template <class T>
void launch_inverse_backward(const DeviceNetwork<T>& net, Stream& stream) {
  stream.launch(inverse_backward_kernel<T>, net.blocks(), net.threads,
                net.tile_bytes() + Panel<T>::bytes(net.tile_rows, net.levels(), true), net);
}

template void launch_inverse_backward(const DeviceNetwork<float>&, Stream&);
template void launch_inverse_backward(const DeviceNetwork<double>&, Stream&);

}  // namespace fastflow
