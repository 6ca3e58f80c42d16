// The schemas of all ops. Each is a pure function of contiguous tensors of one device and dtype;
// what the arguments mean is written in fastflow/reference.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastflow, m) {
  m.def(
      "planar_flow_forward(Tensor z, Tensor w, Tensor u, Tensor b, bool centred) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "planar_flow_backward(Tensor dz_K, Tensor dladj, Tensor z, Tensor z_K, Tensor w, Tensor u, "
      "Tensor a, bool centred, bool param_grads) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "planar_flow_inverse(Tensor z_K, Tensor w, Tensor u, Tensor b, bool centred) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "planar_flow_inverse_backward(Tensor dz, Tensor dladj, Tensor z_K, Tensor z, Tensor w, "
      "Tensor u, Tensor a, bool centred, bool param_grads) -> (Tensor, Tensor, Tensor, Tensor)");
}
