// What a pass needs to know before it starts: packed weights and the tables of its stages.
#include "autoregressive_device.cuh"

namespace fastflow {
namespace {

constexpr int kTile = 32;
constexpr int kThreads = 256;

// How many of the ascending values are at most `bound`.
__device__ int count_up_to(const int32_t* values, int count, int bound) {
  int begin = 0;
  while (begin < count) {
    const int middle = begin + (count - begin) / 2;
    if (values[middle] <= bound)
      begin = middle + 1;
    else
      count = middle;
  }
  return begin;
}

// Stages begin .. end - 1 as one panel: do its units and weights fit?
template <class T>
__device__ bool fits(const DeviceNetwork<T>& net, int begin, int end) {
  int64_t units = 0, weights = 0, below = 0;
  for (int level = 0; level < net.levels(); ++level) {
    const int64_t width = net.end(level, end - 1) - net.end(level, begin - 1);
    units += width;
    weights += width * below;
    below = width;
  }
  return units <= kPanelUnits && weights <= kPanelWeights;
}

// ends; then panels[s], for a sweep upwards the end of the panel that begins with stage s, for one
// downwards the beginning of the panel that ends before stage s. Where not even one stage fits it
// is ~s, or ~(s - 1).
template <class T>
__device__ void write_stages(const DeviceNetwork<T>& net, bool backward) {
  const int D = net.features, outputs = net.layer_count;
  for (int s = int(threadIdx.x) - 1; s <= D; s += kThreads) {
    int32_t* const ends = net.ends + (s + 1);
    ends[0] = smaller(s + 1, D);
    int known = s;
    for (int level = 1; level < outputs; ++level) {
      const auto& layer = net.layers[level - 1];
      int end = s < 0 ? 0 : count_up_to(layer.prefix, layer.rows, known);
      if (layer.skip) end = smaller(end, ends[(level - 2) * (D + 2)]);
      ends[level * (D + 2)] = known = end;
    }
    ends[outputs * (D + 2)] = 2 * smaller(s + 1, D);
  }
  __syncthreads();
  for (int s = threadIdx.x; s <= D + 1; s += kThreads) {
    const bool none = s == (backward ? 0 : D + 1);
    int size = smaller(kPanelStages, backward ? s : D + 1 - s);
    while (size > 0 && !(backward ? fits(net, s - size, s) : fits(net, s, s + size))) --size;
    net.panels[s] = none ? s : backward ? (size ? s - size : ~(s - 1)) : (size ? s + size : ~s);
  }
}

template <class T>
__device__ void write_starts(const DeviceLayer<T>& layer) {
  for (int k = threadIdx.x; k < layer.columns; k += kThreads)
    layer.start[k] = count_up_to(layer.prefix, layer.rows, k);
}

// A square of the sorted weights, through shared memory where it is transposed: both sides of the
// copy run along the rows of their matrix.
template <class T>
__device__ void pack(const DeviceLayer<T>& layer, int tile, bool backward) {
  __shared__ T square[kTile][kTile + 1];
  const int across = divide_up(layer.columns, kTile), x = threadIdx.x % kTile;
  const int u0 = tile / across * kTile, k0 = tile % across * kTile;
  if (layer.prefix[smaller(u0 + kTile, layer.rows) - 1] <= k0) return;  // all masked
  for (int y = threadIdx.x / kTile; y < kTile; y += kThreads / kTile) {
    const int u = u0 + y, k = k0 + x;
    const bool seen = u < layer.rows && k < layer.columns && k < layer.prefix[u];
    const T value =
        seen ? layer.weight[int64_t(layer.order[u]) * layer.columns + layer.column_order[k]] : T(0);
    if (!backward)
      square[x][y] = value;
    else if (u < layer.rows && k < layer.columns)
      layer.packed[int64_t(u) * layer.columns + k] = value;
  }
  __syncthreads();
  if (backward) return;
  for (int y = threadIdx.x / kTile; y < kTile; y += kThreads / kTile)
    if (k0 + y < layer.columns && u0 + x < layer.rows)
      layer.packed[int64_t(k0 + y) * layer.rows + u0 + x] = square[y][x];
}

template <class T>
__host__ __device__ int pack_tiles(const DeviceLayer<T>& layer) {
  return divide_up(layer.rows, kTile) * divide_up(layer.columns, kTile);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ DeviceNetwork<T> net, bool backward) {
  int task = blockIdx.x;
  if (task == 0) {
    if (net.affine) write_stages(net, backward);
    return;
  }
  task -= 1;
  if (task < net.layer_count) {
    write_starts(net.layers[task]);
    return;
  }
  task -= net.layer_count;
  for (int l = 0; l < net.layer_count; ++l) {
    const int tiles = pack_tiles(net.layers[l]);
    if (task < tiles) {
      pack(net.layers[l], task, backward);
      return;
    }
    task -= tiles;
  }
}

}  // namespace

template <class T>
void launch_prepare(const DeviceNetwork<T>& net, bool backward, Stream& stream) {
  int blocks = 1 + net.layer_count;
  for (int l = 0; l < net.layer_count; ++l) blocks += pack_tiles(net.layers[l]);
  stream.launch(prepare_kernel<T>, unsigned(blocks), kThreads, 0, net, backward);
}

template void launch_prepare(const DeviceNetwork<float>&, bool, Stream&);
template void launch_prepare(const DeviceNetwork<double>&, bool, Stream&);

}  // namespace fastflow
