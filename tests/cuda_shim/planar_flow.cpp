// planar_flow's launchers as C functions, for ctypes.
#include "planar_flow/planar_flow.h"

using fastflow::PlanarFlowArgs;

extern "C" {

struct Sizes {
  int64_t batch, features, steps;
  bool shared, centred, inverse, param_grads, is_double;
};

// Pointers in the order of the struct's members: in, w, u, b, out, ladj, a, d_out, dladj, d_in,
// dw, du, db, workspace.
static PlanarFlowArgs arguments(const Sizes& sizes, void* const* p) {
  return {sizes.batch,
          sizes.features,
          sizes.steps,
          sizes.shared,
          sizes.centred,
          sizes.inverse,
          sizes.param_grads,
          sizes.is_double,
          p[0],
          p[1],
          p[2],
          p[3],
          p[4],
          p[5],
          p[6],
          p[7],
          p[8],
          p[9],
          p[10],
          p[11],
          p[12],
          p[13]};
}

size_t planar_flow_workspace(const Sizes& sizes, void* const* pointers, bool backward) {
  const PlanarFlowArgs args = arguments(sizes, pointers);
  return backward ? planar_flow_backward_cuda_workspace(args)
                  : planar_flow_forward_cuda_workspace(args);
}

const char* planar_flow(const Sizes& sizes, void* const* pointers, bool backward) {
  const PlanarFlowArgs args = arguments(sizes, pointers);
  return backward ? planar_flow_backward_cuda(args, nullptr)
                  : planar_flow_forward_cuda(args, nullptr);
}

}  // extern "C"
