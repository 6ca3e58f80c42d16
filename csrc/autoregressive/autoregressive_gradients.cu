// Gradients of weights, biases and terms from the cotangents of all pre-activations: masked outer
// products, summed over the batch in a fixed order.
#include "autoregressive_device.cuh"

namespace fastflow {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // of dW, 4 x 4 for each thread
constexpr int kOwn = 4;
constexpr int kDepth = 16;  // rows of the batch at once
constexpr int kStride = kTile + 4;

// Weights of all layers before layer l.
template <class T>
__device__ int64_t offset_of(const DeviceNetwork<T>& net, int l) {
  int64_t sum = 0;
  for (int i = 0; i < l; ++i) sum += int64_t(net.layers[i].rows) * net.layers[i].columns;
  return sum;
}

// Unit k of the level below layer l, in row b of the batch.
template <class T>
__device__ __forceinline__ T value_of(const DeviceNetwork<T>& net, int l, int k, int64_t b) {
  if (l == 0) return net.x[b * net.features + net.layers[0].column_order[k]];
  const T p = net.saved[net.row_of(l) + k * net.stride + b];
  return net.layers[l - 1].linear ? p : activation(net.activation, p);
}

// A tile's sums over rows begin .. end - 1 of the batch.
template <class T>
__device__ __forceinline__ void outer_product(const DeviceNetwork<T>& net, int l, int u0, int k0,
                                              int64_t begin, int64_t end, T (&sums)[kOwn][kOwn]) {
  __shared__ T d[kDepth][kStride], a[kDepth][kStride];
  const DeviceLayer<T>& layer = net.layers[l];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  for (int64_t b0 = begin; b0 < end; b0 += kDepth) {
    for (int i = ty; i < kTile; i += kThreads / kDepth) {
      const int64_t b = b0 + tx;
      const int u = u0 + i, k = k0 + i;
      d[tx][i] =
          b < end && u < layer.rows ? net.cotangents[net.row_of(l + 1) + u * net.stride + b] : T(0);
      a[tx][i] = b < end && k < layer.columns ? value_of(net, l, k, b) : T(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int b = 0; b < kDepth; ++b) {
      T left[kOwn], right[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) left[i] = d[b][ty + 16 * i];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) right[j] = a[b][tx + 16 * j];
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sums[i][j] += left[i] * right[j];
    }
    __syncthreads();
  }
}

template <class T>
__device__ __forceinline__ void store_weight(const DeviceLayer<T>& layer, int u, int k, T value) {
  layer.dweight[int64_t(layer.order[u]) * layer.columns + layer.column_order[k]] = value;
}

template <class T>
__host__ __device__ int weight_tiles(const DeviceLayer<T>& layer) {
  return divide_up(layer.rows, kTile) * divide_up(layer.columns, kTile);
}

// One tile of dW for one piece of the batch. Tiles above the stair are not computed.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(const __grid_constant__ DeviceNetwork<T> net) {
  int tile = blockIdx.x, l = 0;
  for (; tile >= weight_tiles(net.layers[l]); ++l) tile -= weight_tiles(net.layers[l]);
  const DeviceLayer<T>& layer = net.layers[l];
  const int across = divide_up(layer.columns, kTile);
  const int u0 = tile / across * kTile, k0 = tile % across * kTile;
  const int pieces = gridDim.y, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const bool seen = layer.prefix[smaller(u0 + kTile, layer.rows) - 1] > k0;
  if (!seen && pieces > 1) return;
  T sums[kOwn][kOwn] = {};
  const int64_t rows = divide_up<int64_t>(net.batch, pieces), begin = blockIdx.y * rows;
  if (seen) outer_product(net, l, u0, k0, begin, smaller(begin + rows, net.batch), sums);
  T* const partial = net.partial + blockIdx.y * offset_of(net, net.layer_count) + offset_of(net, l);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int u = u0 + ty + 16 * i;
    if (u >= layer.rows) continue;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int k = k0 + tx + 16 * j;
      if (k >= layer.columns) continue;
      if (pieces > 1)
        partial[int64_t(u) * layer.columns + k] = sums[i][j];
      else
        store_weight(layer, u, k, k < layer.prefix[u] ? sums[i][j] : T(0));
    }
  }
}

// The sum of all pieces; block y is the layer.
template <class T>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ DeviceNetwork<T> net, int pieces) {
  const DeviceLayer<T>& layer = net.layers[blockIdx.y];
  const int64_t size = int64_t(layer.rows) * layer.columns, all = offset_of(net, net.layer_count);
  const T* const partial = net.partial + offset_of(net, blockIdx.y);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size;
       i += int64_t(gridDim.x) * kThreads) {
    const int u = int(i / layer.columns), k = int(i % layer.columns);
    T sum = 0;
    if (k < layer.prefix[u])
      for (int piece = 0; piece < pieces; ++piece) sum += partial[piece * all + i];
    store_weight(layer, u, k, sum);
  }
}

// Gradients of terms and biases; block y is the layer. A warp takes a unit for a bias, and a square
// of 32 x 32 goes through shared memory for a term.
template <class T>
__global__ void __launch_bounds__(kThreads)
    additive_kernel(const __grid_constant__ DeviceNetwork<T> net) {
  __shared__ T square[32][33];
  const DeviceLayer<T>& layer = net.layers[blockIdx.y];
  const T* const cotangents = net.cotangents + net.row_of(blockIdx.y + 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = divide_up(layer.rows, 32);
  if (layer.dbias)
    for (int u = blockIdx.x * (kThreads / 32) + warp; u < layer.rows;
         u += gridDim.x * (kThreads / 32)) {
      T sum[1] = {0};
      for (int64_t b = lane; b < net.batch; b += 32) sum[0] += cotangents[u * net.stride + b];
      group_sum<32>(sum, static_cast<T*>(nullptr), 0);
      if (lane == 0) layer.dbias[layer.order[u]] = sum[0];
    }
  if (!layer.dterm) return;
  const int64_t squares = across * divide_up<int64_t>(net.batch, 32);
  for (int64_t i = blockIdx.x; i < squares; i += gridDim.x) {
    const int64_t b0 = i / across * 32;
    const int u0 = int(i % across) * 32;
    for (int y = warp; y < 32; y += kThreads / 32)
      if (u0 + y < layer.rows && b0 + lane < net.batch)
        square[lane][y] = cotangents[(u0 + y) * net.stride + b0 + lane];
    __syncthreads();
    for (int y = warp; y < 32; y += kThreads / 32)
      if (u0 + lane < layer.rows && b0 + y < net.batch)
        layer.dterm[(b0 + y) * layer.rows + layer.order[u0 + lane]] = square[y][lane];
    __syncthreads();
  }
}

}  // namespace

template <class T>
int gradient_pieces(const DeviceNetwork<T>& net, int64_t processors) {
  int64_t tiles = 0;
  for (int l = 0; l < net.layer_count; ++l) tiles += weight_tiles(net.layers[l]);
  const int64_t wanted = divide_up<int64_t>(4 * processors, tiles);
  return int(smaller(wanted, divide_up<int64_t>(net.batch, 4 * kDepth)));
}

template <class T>
void launch_gradients(const DeviceNetwork<T>& net, int pieces, Stream& stream) {
  bool weights = false, additive = false;
  int tiles = 0;
  for (int l = 0; l < net.layer_count; ++l) {
    tiles += weight_tiles(net.layers[l]);
    weights |= net.layers[l].dweight != nullptr;
    additive |= net.layers[l].dbias || net.layers[l].dterm;
  }
  if (weights) {
    stream.launch(weight_kernel<T>, dim3(unsigned(tiles), unsigned(pieces)), kThreads, 0, net);
    if (pieces > 1)
      stream.launch(
          reduce_kernel<T>,
          dim3(unsigned(divide_up(tiles, net.layer_count)) * 4, unsigned(net.layer_count)),
          kThreads, 0, net, pieces);
  }
  if (additive)
    stream.launch(additive_kernel<T>, dim3(64, unsigned(net.layer_count)), kThreads, 0, net);
}

template int gradient_pieces(const DeviceNetwork<float>&, int64_t);
template int gradient_pieces(const DeviceNetwork<double>&, int64_t);
template void launch_gradients(const DeviceNetwork<float>&, int, Stream&);
template void launch_gradients(const DeviceNetwork<double>&, int, Stream&);

}  // namespace fastflow
