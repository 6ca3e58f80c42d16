// Entry point of the CUDA kernels of made and autoregressive: the network in sorted order, its
// place in the workspace, and the launches of each pass.
#include "autoregressive_sweep.cuh"

namespace fastflow {
namespace {

bool is_backward(MaskedPass pass) {
  return pass == MaskedPass::backward || pass == MaskedPass::inverse_backward;
}
bool is_sweep(MaskedPass pass) {
  return pass == MaskedPass::inverse || pass == MaskedPass::inverse_backward;
}

// Takes arrays off the workspace; from a null workspace only their size.
class Memory {
 public:
  explicit Memory(void* start) : start_(static_cast<char*>(start)) {}
  template <class U>
  U* take(int64_t count) {
    char* const at = start_ ? start_ + bytes_ : nullptr;
    bytes_ += divide_up<size_t>(size_t(count) * sizeof(U), 256) * 256;
    return reinterpret_cast<U*>(at);
  }
  size_t bytes() const { return bytes_; }

 private:
  char* start_;
  size_t bytes_ = 0;
};

template <class T>
DeviceNetwork<T> network(const AutoregressiveArgs& args) {
  DeviceNetwork<T> net{};
  net.features = int(args.features);
  net.layer_count = int(args.layer_count);
  net.units = net.features;
  net.affine = args.affine;
  net.residual = args.residual;
  net.activation = args.activation;
  net.scale = args.scale;
  net.c0 = T(args.c0);
  net.c1 = T(args.c1);
  net.batch = args.batch;
  net.stride = divide_up<int64_t>(args.batch, kThreadRows) * kThreadRows;
  net.x = static_cast<T*>(args.x);
  net.y = static_cast<T*>(args.y);
  net.ladj = static_cast<T*>(args.ladj);
  net.saved = static_cast<T*>(args.saved);
  net.d_out = static_cast<const T*>(args.d_out);
  net.d_ladj = static_cast<const T*>(args.d_ladj);
  net.d_in = static_cast<T*>(args.d_in);
  for (int l = 0; l < net.layer_count; ++l) {
    const MaskedLayer& from = args.layers[l];
    DeviceLayer<T>& to = net.layers[l];
    const bool last = l + 1 == net.layer_count;
    to.rows = int(from.rows);
    to.columns = int(from.columns);
    to.place = net.units;
    to.skip = args.residual && !last && l >= 2 && l % 2 == 0;
    to.linear = last || (args.residual && l + 2 == net.layer_count);
    to.order = from.order;
    to.prefix = from.prefix;
    to.column_order = from.column_order;
    to.weight = static_cast<const T*>(from.weight);
    to.bias = static_cast<const T*>(from.bias);
    to.term = static_cast<const T*>(from.term);
    to.dweight = static_cast<T*>(from.dweight);
    to.dbias = static_cast<T*>(from.dbias);
    to.dterm = static_cast<T*>(from.dterm);
    net.units += to.rows;
  }
  return net;
}

constexpr int kWide = 256;  // units of a layer from which on each layer is a kernel

// The size of tiles: as many rows as leave no multiprocessor idle and fit, at least 8. What decides
// between kernels that round differently is the network alone: a row's bits do not depend on the
// batch.
template <class T>
void choose_tile(DeviceNetwork<T>& net, MaskedPass pass, const AutoregressiveArgs& args) {
  int widest = 0;
  for (int level = 0; level < net.levels(); ++level)
    widest = net.width(level) > widest ? net.width(level) : widest;
  net.wide = !is_sweep(pass) && widest >= kWide;
  const bool stream = pass == MaskedPass::forward && net.residual;
  const bool input = pass == MaskedPass::backward && net.wide && net.affine;
  net.tile_units = net.units + (stream ? net.layers[0].rows : input ? net.features : 0);
  const auto fits = [&](int rows) {
    const size_t sweep =
        is_sweep(pass) ? Panel<T>::bytes(rows, net.levels(), is_backward(pass)) : 0;
    return size_t(net.tile_units) * rows * sizeof(T) + sweep <= size_t(args.shared_limit);
  };
  net.tile_rows = kThreadRows;
  net.on_chip = !net.wide && fits(kThreadRows);
  while (net.on_chip && net.tile_rows < 4 * kThreadRows && fits(2 * net.tile_rows) &&
         args.batch >= 2 * net.tile_rows * args.processors)
    net.tile_rows *= 2;
  net.threads = net.tile_units * (net.tile_rows / kThreadRows) < 1024 ? 256 : 512;
}

struct Plan {
  size_t bytes;
  int pieces;
};

template <class T>
Plan place(DeviceNetwork<T>& net, MaskedPass pass, const AutoregressiveArgs& args) {
  Memory memory(args.workspace);
  net.ends = memory.take<int32_t>(int64_t(net.levels()) * (net.features + 2));
  net.panels = memory.take<int32_t>(net.features + 2);
  int64_t weights = 0;
  bool weight_grads = false, grads = false;
  for (int l = 0; l < net.layer_count; ++l) {
    DeviceLayer<T>& layer = net.layers[l];
    layer.start = memory.take<int32_t>(layer.columns);
    layer.packed = memory.take<T>(int64_t(layer.rows) * layer.columns);
    weights += int64_t(layer.rows) * layer.columns;
    weight_grads |= layer.dweight != nullptr;
    grads |= layer.dweight || layer.dbias || layer.dterm;
  }
  if (!net.on_chip)
    net.tiles = memory.take<T>(int64_t(net.blocks()) * net.tile_units * net.tile_rows);
  int pieces = 1;
  if (net.wide && is_backward(pass))
    net.cotangents = net.tiles ? net.tiles + net.features * net.stride : nullptr;
  else if (is_backward(pass) && grads)
    net.cotangents = memory.take<T>((net.units - net.features) * net.stride);
  if (is_backward(pass) && weight_grads) {
    pieces = gradient_pieces(net, args.processors);
    if (pieces > 1) net.partial = memory.take<T>(pieces * weights);
  }
  return {memory.bytes(), pieces};
}

template <class T>
const char* run(MaskedPass pass, const AutoregressiveArgs& args, cudaStream_t cuda_stream) {
  DeviceNetwork<T> net = network<T>(args);
  choose_tile(net, pass, args);
  const Plan plan = place(net, pass, args);
  Stream stream(cuda_stream);
  launch_prepare(net, is_backward(pass), stream);
  const auto forward = net.wide ? launch_wide_forward<T> : launch_forward<T>;
  const auto backward = net.wide ? launch_wide_backward<T> : launch_backward<T>;
  const auto launch = pass == MaskedPass::forward    ? forward
                      : pass == MaskedPass::backward ? backward
                      : pass == MaskedPass::inverse  ? launch_inverse<T>
                                                     : launch_inverse_backward<T>;
  launch(net, stream);
  if (is_backward(pass)) launch_gradients(net, plan.pieces, stream);
  return stream.error();
}

template <class T>
size_t workspace(MaskedPass pass, const AutoregressiveArgs& args) {
  DeviceNetwork<T> net = network<T>(args);
  choose_tile(net, pass, args);
  return place(net, pass, args).bytes;
}

const char* refuse(const AutoregressiveArgs& args) {
  return args.layer_count <= kMostLayers ? nullptr : "the network has more than 24 layers";
}

}  // namespace

const char* autoregressive_cuda(MaskedPass pass, const AutoregressiveArgs& args,
                                cudaStream_t stream) {
  if (const char* const error = refuse(args)) return error;
  return args.is_double ? run<double>(pass, args, stream) : run<float>(pass, args, stream);
}

size_t autoregressive_cuda_workspace(MaskedPass pass, const AutoregressiveArgs& args) {
  if (refuse(args)) return 0;
  AutoregressiveArgs sized = args;
  sized.workspace = nullptr;
  return args.is_double ? workspace<double>(pass, sized) : workspace<float>(pass, sized);
}

int64_t autoregressive_cuda_saved(const AutoregressiveArgs& args) {
  int64_t units = args.affine ? args.outputs() : 0;
  for (int64_t l = 0; l + 1 < args.layer_count; ++l) units += args.layers[l].rows;
  return units * divide_up<int64_t>(args.batch, kThreadRows) * kThreadRows;
}

const char* autoregressive_cuda_device(AutoregressiveArgs& args) {
  int device = 0, limit = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  args.shared_limit = limit;
  args.processors = processors;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastflow
