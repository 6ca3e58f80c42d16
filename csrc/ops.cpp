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

  // saved is what the backward of the same backend needs, empty if save is false; lists have an
  // entry per layer, of shape (0,) where there is nothing.
  m.def(
      "made_forward(Tensor x, Tensor[] terms, Tensor[] weights, Tensor[] biases, Tensor stairs, "
      "int activation, bool residual, bool save) -> (Tensor, Tensor)");
  m.def(
      "made_backward(Tensor dy, Tensor x, Tensor saved, Tensor[] weights, Tensor stairs, "
      "int activation, bool residual, int term_layers, int bias_layers, bool x_grad, "
      "bool param_grads) -> (Tensor, Tensor[], Tensor[], Tensor[])");
  m.def(
      "autoregressive_forward(Tensor x, Tensor[] terms, Tensor[] weights, Tensor[] biases, "
      "Tensor stairs, int activation, bool residual, int scale, float c0, float c1, bool save) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "autoregressive_backward(Tensor dy, Tensor dladj, Tensor x, Tensor saved, Tensor[] weights, "
      "Tensor stairs, int activation, bool residual, int scale, float c0, float c1, "
      "int term_layers, int bias_layers, bool x_grad, bool param_grads) "
      "-> (Tensor, Tensor[], Tensor[], Tensor[])");
  m.def(
      "autoregressive_inverse(Tensor y, Tensor[] terms, Tensor[] weights, Tensor[] biases, "
      "Tensor stairs, int activation, bool residual, int scale, float c0, float c1, bool save) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "autoregressive_inverse_backward(Tensor dx, Tensor dladj, Tensor x, Tensor saved, "
      "Tensor[] weights, Tensor stairs, int activation, bool residual, int scale, float c0, "
      "float c1, int term_layers, int bias_layers, bool x_grad, bool param_grads) "
      "-> (Tensor, Tensor[], Tensor[], Tensor[])");
}
