// autoregressive's launchers as C functions, for ctypes.
#include "autoregressive/autoregressive.h"

#include <vector>

using namespace fastflow;

extern "C" {

struct Shape {
  int64_t pass, batch, features, layer_count, activation, scale;
  double c0, c1;
  int64_t shared_limit, processors;  // 0: those of the device
  bool residual, affine, is_double;
};

static const char* limits_error;

// `tensors`: x, y, ladj, saved, d_out, d_ladj, d_in, workspace. `sizes`: n_0 .. n_{L+1}. `levels`:
// order_0, then order and prefix of each layer. `parameters`: weight, bias, term, dweight, dbias,
// dterm of each layer.
static AutoregressiveArgs arguments(const Shape& shape, void* const* tensors, const int64_t* sizes,
                                    void* const* levels, void* const* parameters,
                                    std::vector<MaskedLayer>& layers) {
  const auto table = [&](int64_t i) { return static_cast<const int32_t*>(levels[i]); };
  for (int64_t l = 0; l < shape.layer_count; ++l) {
    void* const* const p = parameters + 6 * l;
    layers.push_back({sizes[l + 1], sizes[l], table(2 * l + 1), table(2 * l + 2),
                      table(l ? 2 * l - 1 : 0), p[0], p[1], p[2], p[3], p[4], p[5]});
  }
  AutoregressiveArgs args{};
  args.batch = shape.batch;
  args.features = shape.features;
  args.layer_count = shape.layer_count;
  args.layers = layers.data();
  args.activation = Activation(shape.activation);
  args.residual = shape.residual;
  args.affine = shape.affine;
  args.scale = Scale(shape.scale);
  args.c0 = shape.c0;
  args.c1 = shape.c1;
  args.is_double = shape.is_double;
  args.x = tensors[0];
  args.y = tensors[1];
  args.ladj = tensors[2];
  args.saved = tensors[3];
  args.d_out = tensors[4];
  args.d_ladj = tensors[5];
  args.d_in = tensors[6];
  args.workspace = tensors[7];
  limits_error = autoregressive_cuda_device(args);
  if (shape.shared_limit) args.shared_limit = shape.shared_limit;
  if (shape.processors) args.processors = shape.processors;
  return args;
}

size_t autoregressive_workspace(const Shape& shape, void* const* tensors, const int64_t* sizes,
                                void* const* levels, void* const* parameters) {
  std::vector<MaskedLayer> layers;
  return autoregressive_cuda_workspace(
      MaskedPass(shape.pass), arguments(shape, tensors, sizes, levels, parameters, layers));
}

int64_t autoregressive_saved(const Shape& shape, void* const* tensors, const int64_t* sizes,
                             void* const* levels, void* const* parameters) {
  std::vector<MaskedLayer> layers;
  return autoregressive_cuda_saved(arguments(shape, tensors, sizes, levels, parameters, layers));
}

const char* autoregressive(const Shape& shape, void* const* tensors, const int64_t* sizes,
                           void* const* levels, void* const* parameters) {
  std::vector<MaskedLayer> layers;
  const AutoregressiveArgs args = arguments(shape, tensors, sizes, levels, parameters, layers);
  if (limits_error) return limits_error;
  return autoregressive_cuda(MaskedPass(shape.pass), args, nullptr);
}

}  // extern "C"
