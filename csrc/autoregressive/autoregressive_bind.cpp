// Registers made and autoregressive with PyTorch: from stable-ABI tensors to AutoregressiveArgs and
// back. Compiled into the CPU libraries, and with -DFASTFLOW_CUDA into the CUDA one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#ifdef FASTFLOW_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#include "autoregressive_call.h"

namespace fastflow {
namespace {

using Gradients = std::tuple<Tensor, Tensors, Tensors, Tensors>;

#ifdef FASTFLOW_CUDA
void launch(MaskedPass pass, AutoregressiveArgs& args, const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const char* error = autoregressive_cuda_device(args);
  check(error == nullptr, "CUDA: ", error ? error : "");
  const int64_t bytes = int64_t(autoregressive_cuda_workspace(pass, args));
  const Tensor memory = empty({bytes}, x, ScalarType::Byte);
  args.workspace = memory.data_ptr();
  error = autoregressive_cuda(pass, args, static_cast<CUstream_st*>(stream));
  check(error == nullptr, "CUDA: ", error ? error : "");
}
#else
void launch(MaskedPass pass, const AutoregressiveArgs& args, const Tensor&) {
  switch (pass) {
    case MaskedPass::forward:
      return autoregressive_forward_cpu(args);
    case MaskedPass::backward:
      return autoregressive_backward_cpu(args);
    case MaskedPass::inverse:
      return autoregressive_inverse_cpu(args);
    case MaskedPass::inverse_backward:
      return autoregressive_inverse_backward_cpu(args);
  }
}
#endif

// Whole tiles of the most rows, as fastflow/native.py tells torch.compile: a size that branched on
// the batch would be another graph for each branch. The layout of CUDA fits too. What lies behind
// the tiles of the batch is never written nor read.
int64_t saved_size(const AutoregressiveArgs& args) {
  int64_t units = args.context_units() + (args.affine ? args.outputs() : 0);
  for (int64_t l = 0; l + 1 < args.layer_count; ++l) units += args.layers[l].rows;
  return (args.batch + kMostTileRows - 1) / kMostTileRows * kMostTileRows * units;
}

// Both directions of autoregressive, and made: {result, ladj, saved}. `in` is the op's input.
std::tuple<Tensor, Tensor, Tensor> run(Call& call, MaskedPass pass, const Tensor& in, bool save) {
  AutoregressiveArgs& args = call.args;
  const bool inverse = pass == MaskedPass::inverse;
  const int64_t B = args.batch;
  Tensor out = empty({B, args.affine ? args.features : args.outputs()}, in);
  Tensor ladj = empty({args.affine ? B : 0}, in);
  Tensor saved = empty({save ? saved_size(args) : 0}, in);
  args.x = inverse ? out.data_ptr() : in.data_ptr();
  args.y = inverse ? in.data_ptr() : out.data_ptr();
  args.ladj = ladj.data_ptr();
  args.saved = save ? saved.data_ptr() : nullptr;
  launch(pass, args, in);
  return {std::move(out), std::move(ladj), std::move(saved)};
}

Gradients run_backward(Call& call, MaskedPass pass, const Tensor& d_out, const Tensor* d_ladj,
                       const Tensor& x, const Tensor& saved, int64_t terms_grad,
                       int64_t biases_given, bool x_grad, bool param_grads) {
  AutoregressiveArgs& args = call.args;
  const int64_t B = args.batch, D = args.features;
  check_like(d_out, "the cotangent of the output", x, {B, args.affine ? D : args.outputs()});
  if (d_ladj) check_like(*d_ladj, "dladj", x, {B});
  check_like(saved, "saved", x, {saved_size(args)});
  args.x = x.data_ptr();
  args.saved = saved.data_ptr();
  args.d_out = d_out.data_ptr();
  args.d_ladj = d_ladj ? d_ladj->data_ptr() : nullptr;
  Tensor d_in = x_grad ? empty({B, D}, x) : empty({0}, x);
  args.d_in = x_grad ? d_in.data_ptr() : nullptr;
  Tensors dterms, dweights, dbiases;
  for (size_t l = 0; l < call.layers.size(); ++l) {
    MaskedLayer& layer = call.layers[l];
    const bool term = terms_grad >> l & 1, bias = param_grads && biases_given >> l & 1;
    if (!args.context) dterms.push_back(term ? empty({B, layer.rows}, x) : empty({0}, x));
    dweights.push_back(param_grads ? empty({layer.rows, layer.columns}, x) : empty({0}, x));
    dbiases.push_back(bias ? empty({layer.rows}, x) : empty({0}, x));
    layer.dterm = term ? dterms[l].data_ptr() : nullptr;
    layer.dweight = param_grads ? dweights[l].data_ptr() : nullptr;
    layer.dbias = bias ? dbiases[l].data_ptr() : nullptr;
  }
  launch(pass, args, x);
  return {std::move(d_in), std::move(dterms), std::move(dweights), std::move(dbiases)};
}

std::tuple<Tensor, Tensor> made_forward(Tensor x, Tensors terms, Tensors weights, Tensors biases,
                                        Tensor stairs, int64_t activation, bool residual,
                                        bool save) {
  Call call(x, weights, stairs, activation, residual);
  call.set_parameters(x, terms, biases);
#ifndef FASTFLOW_CUDA
  call.check_dependence();
#endif
  auto [y, ladj, saved] = run(call, MaskedPass::forward, x, save);
  return {std::move(y), std::move(saved)};
}

Gradients made_backward(Tensor dy, Tensor x, Tensor saved, Tensors weights, Tensor stairs,
                        int64_t activation, bool residual, int64_t terms_grad, int64_t biases_given,
                        bool x_grad, bool param_grads) {
  Call call(x, weights, stairs, activation, residual);
  return run_backward(call, MaskedPass::backward, dy, nullptr, x, saved, terms_grad, biases_given,
                      x_grad, param_grads);
}

template <MaskedPass pass>
std::tuple<Tensor, Tensor, Tensor> autoregressive(Tensor in, Tensors terms, Tensors weights,
                                                  Tensors biases, Tensor stairs, int64_t activation,
                                                  bool residual, int64_t scale, double c0,
                                                  double c1, bool save) {
  Call call(in, weights, stairs, activation, residual);
  call.set_scale(scale, c0, c1);
  call.set_parameters(in, terms, biases);
#ifndef FASTFLOW_CUDA
  call.check_dependence();
#endif
  return run(call, pass, in, save);
}

template <MaskedPass pass>
Gradients autoregressive_gradients(Tensor d_out, Tensor dladj, Tensor x, Tensor saved,
                                   Tensors weights, Tensor stairs, int64_t activation,
                                   bool residual, int64_t scale, double c0, double c1,
                                   int64_t terms_grad, int64_t biases_given, bool x_grad,
                                   bool param_grads) {
  Call call(x, weights, stairs, activation, residual);
  call.set_scale(scale, c0, c1);
  return run_backward(call, pass, d_out, &dladj, x, saved, terms_grad, biases_given, x_grad,
                      param_grads);
}

#ifndef FASTFLOW_CUDA
template <MaskedPass pass>
std::tuple<Tensor, Tensor, Tensor> with_context(Tensor in, Tensor context, Tensor context_weight,
                                                std::optional<Tensor> context_bias,
                                                bool context_activated, Tensors weights,
                                                Tensors biases, Tensor stairs, int64_t activation,
                                                bool residual, int64_t scale, double c0, double c1,
                                                bool save) {
  Call call(in, weights, stairs, activation, residual);
  call.set_scale(scale, c0, c1);
  call.set_parameters(in, {}, biases);
  call.set_context(in, context, context_weight, context_activated);
  if (context_bias) {
    check_like(*context_bias, "the context's bias", in, {call.layers[0].rows});
    call.context.layer.bias = context_bias->data_ptr();
  }
  call.check_dependence();
  return run(call, pass, in, save);
}

template <MaskedPass pass>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors, Tensors> with_context_gradients(
    Tensor d_out, Tensor dladj, Tensor x, Tensor context, Tensor saved, Tensor context_weight,
    bool context_bias_given, bool context_activated, Tensors weights, Tensor stairs,
    int64_t activation, bool residual, int64_t scale, double c0, double c1, int64_t biases_given,
    bool x_grad, bool context_grad, bool param_grads) {
  Call call(x, weights, stairs, activation, residual);
  call.set_scale(scale, c0, c1);
  call.set_context(x, context, context_weight, context_activated);
  MaskedLayer& layer = call.context.layer;
  const bool bias = context_bias_given && param_grads;
  Tensor dcontext = context_grad ? empty({call.args.batch, layer.columns}, x) : empty({0}, x);
  Tensor dweight = param_grads ? empty({layer.rows, layer.columns}, x) : empty({0}, x);
  Tensor dbias = empty({bias ? layer.rows : 0}, x);
  call.context.d_values = context_grad ? dcontext.data_ptr() : nullptr;
  layer.dweight = param_grads ? dweight.data_ptr() : nullptr;
  layer.dbias = bias ? dbias.data_ptr() : nullptr;
  auto [dx, no_terms, dweights, dbiases] =
      run_backward(call, pass, d_out, &dladj, x, saved, 0, biases_given, x_grad, param_grads);
  return {std::move(dx),    std::move(dcontext), std::move(dweight),
          std::move(dbias), std::move(dweights), std::move(dbiases)};
}
#endif

void register_masked(torch::stable::detail::StableLibrary& m) {
  m.impl("made_forward", TORCH_BOX(&made_forward));
  m.impl("made_backward", TORCH_BOX(&made_backward));
  m.impl("autoregressive_forward", TORCH_BOX(&autoregressive<MaskedPass::forward>));
  m.impl("autoregressive_inverse", TORCH_BOX(&autoregressive<MaskedPass::inverse>));
  m.impl("autoregressive_backward", TORCH_BOX(&autoregressive_gradients<MaskedPass::backward>));
  m.impl("autoregressive_inverse_backward",
         TORCH_BOX(&autoregressive_gradients<MaskedPass::inverse_backward>));
}

}  // namespace
}  // namespace fastflow

#ifdef FASTFLOW_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastflow, CUDA, m) { fastflow::register_masked(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(fastflow, CPU, m) {
  fastflow::register_masked(m);
  using fastflow::MaskedPass;
  m.impl("autoregressive_context_forward", TORCH_BOX(&fastflow::with_context<MaskedPass::forward>));
  m.impl("autoregressive_context_backward",
         TORCH_BOX(&fastflow::with_context_gradients<MaskedPass::backward>));
  m.impl("autoregressive_context_inverse", TORCH_BOX(&fastflow::with_context<MaskedPass::inverse>));
  m.impl("autoregressive_context_inverse_backward",
         TORCH_BOX(&fastflow::with_context_gradients<MaskedPass::inverse_backward>));
}
#endif
