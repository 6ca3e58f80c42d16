// Registers planar_flow with PyTorch: from stable-ABI tensors to PlanarFlowArgs and back. Compiled
// into the CPU libraries, and with -DFASTFLOW_CUDA into the CUDA one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <tuple>

#include "../common/bind.h"
#include "planar_flow.h"

#ifdef FASTFLOW_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fastflow {
namespace {

void check_like(const Tensor& tensor, const char* name, const Tensor& first, Shape shape) {
  fastflow::check_like("planar_flow", tensor, name, first, shape);
}

// Sizes, flags and inputs from z (B, D) and w, u (K, D) or (B, K, D), with the checks that both
// directions and both passes share.
PlanarFlowArgs prepare(const Tensor& z, const Tensor& w, const Tensor& u, bool centred,
                       bool inverse) {
  const auto dtype = z.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "planar_flow: z must be float32 or float64");
  STD_TORCH_CHECK(z.dim() == 2, "planar_flow: z must have shape (B, D)");
  STD_TORCH_CHECK(w.dim() == 2 || w.dim() == 3, "planar_flow: w must have 2 or 3 dimensions");
  PlanarFlowArgs args{};
  args.batch = z.size(0);
  args.features = z.size(1);
  args.shared = w.dim() == 2;
  args.steps = w.size(args.shared ? 0 : 1);
  args.centred = centred;
  args.inverse = inverse;
  args.is_double = dtype == ScalarType::Double;
  STD_TORCH_CHECK(args.batch >= 1 && args.features >= 1 && args.steps >= 1,
                  "planar_flow: B, D and K must be at least 1");
  const int64_t B = args.batch, D = args.features, K = args.steps;
  check_like(z, "z", z, {B, D});
  for (const auto& [name, tensor] : {std::pair{"w", &w}, std::pair{"u", &u}})
    args.shared ? check_like(*tensor, name, z, {K, D}) : check_like(*tensor, name, z, {B, K, D});
  args.in = z.data_ptr();
  args.w = w.data_ptr();
  args.u = u.data_ptr();
  return args;
}

#ifdef FASTFLOW_CUDA
template <class Workspace, class Launch>
void launch(PlanarFlowArgs& args, const Tensor& z, Workspace workspace, Launch launcher) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(z.get_device_index(), &stream));
  const Tensor memory = empty({int64_t(workspace(args))}, z, ScalarType::Byte);
  args.workspace = memory.data_ptr();
  const char* error = launcher(args, static_cast<CUstream_st*>(stream));
  STD_TORCH_CHECK(error == nullptr, "planar_flow: CUDA: ", error ? error : "");
}
void run_forward(PlanarFlowArgs& args, const Tensor& z) {
  launch(args, z, planar_flow_forward_cuda_workspace, planar_flow_forward_cuda);
}
void run_backward(PlanarFlowArgs& args, const Tensor& z) {
  launch(args, z, planar_flow_backward_cuda_workspace, planar_flow_backward_cuda);
}
#else
void run_forward(PlanarFlowArgs& args, const Tensor&) { planar_flow_forward_cpu(args); }
void run_backward(PlanarFlowArgs& args, const Tensor&) { planar_flow_backward_cpu(args); }
#endif

std::tuple<Tensor, Tensor, Tensor> apply(const Tensor& in, const Tensor& w, const Tensor& u,
                                         const Tensor& b, bool centred, bool inverse) {
  PlanarFlowArgs args = prepare(in, w, u, centred, inverse);
  const int64_t B = args.batch, D = args.features, K = args.steps;
  args.shared ? check_like(b, "b", in, {K}) : check_like(b, "b", in, {B, K});
  Tensor out = empty({B, D}, in), ladj = empty({B}, in), a = empty({B, K}, in);
  args.b = b.data_ptr();
  args.out = out.data_ptr();
  args.ladj = ladj.data_ptr();
  args.a = a.data_ptr();
  run_forward(args, in);
  return {std::move(out), std::move(ladj), std::move(a)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> apply_backward(const Tensor& d_out, const Tensor& dladj,
                                                          const Tensor& in, const Tensor& out,
                                                          const Tensor& w, const Tensor& u,
                                                          const Tensor& a, bool centred,
                                                          bool param_grads, bool inverse) {
  PlanarFlowArgs args = prepare(in, w, u, centred, inverse);
  const int64_t B = args.batch, D = args.features, K = args.steps;
  check_like(d_out, "the cotangent of the output", in, {B, D});
  check_like(dladj, "dladj", in, {B});
  check_like(out, "the output", in, {B, D});
  check_like(a, "a", in, {B, K});
  args.param_grads = param_grads;
  args.d_out = d_out.data_ptr();
  args.dladj = dladj.data_ptr();
  args.out = out.data_ptr();
  args.a = a.data_ptr();
  const auto like_w = [&] {
    if (!param_grads) return empty({0}, in);
    return args.shared ? empty({K, D}, in) : empty({B, K, D}, in);
  };
  const auto like_b = [&] {
    if (!param_grads) return empty({0}, in);
    return args.shared ? empty({K}, in) : empty({B, K}, in);
  };
  Tensor d_in = empty({B, D}, in), dw = like_w(), du = like_w(), db = like_b();
  args.d_in = d_in.data_ptr();
  args.dw = dw.data_ptr();
  args.du = du.data_ptr();
  args.db = db.data_ptr();
  run_backward(args, in);
  return {std::move(d_in), std::move(dw), std::move(du), std::move(db)};
}

std::tuple<Tensor, Tensor, Tensor> planar_flow_forward(Tensor z, Tensor w, Tensor u, Tensor b,
                                                       bool centred) {
  return apply(z, w, u, b, centred, false);
}

std::tuple<Tensor, Tensor, Tensor> planar_flow_inverse(Tensor z_K, Tensor w, Tensor u, Tensor b,
                                                       bool centred) {
  return apply(z_K, w, u, b, centred, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> planar_flow_backward(Tensor dz_K, Tensor dladj, Tensor z,
                                                                Tensor z_K, Tensor w, Tensor u,
                                                                Tensor a, bool centred,
                                                                bool param_grads) {
  return apply_backward(dz_K, dladj, z, z_K, w, u, a, centred, param_grads, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> planar_flow_inverse_backward(Tensor dz, Tensor dladj,
                                                                        Tensor z_K, Tensor z,
                                                                        Tensor w, Tensor u,
                                                                        Tensor a, bool centred,
                                                                        bool param_grads) {
  return apply_backward(dz, dladj, z_K, z, w, u, a, centred, param_grads, true);
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("planar_flow_forward", TORCH_BOX(&planar_flow_forward));
  m.impl("planar_flow_backward", TORCH_BOX(&planar_flow_backward));
  m.impl("planar_flow_inverse", TORCH_BOX(&planar_flow_inverse));
  m.impl("planar_flow_inverse_backward", TORCH_BOX(&planar_flow_inverse_backward));
}

}  // namespace
}  // namespace fastflow

#ifdef FASTFLOW_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastflow, CUDA, m) { fastflow::register_kernels(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(fastflow, CPU, m) { fastflow::register_kernels(m); }
#endif
