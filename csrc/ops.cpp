// The schemas of all ops. Each is a pure function of contiguous tensors of one device and dtype;
// what the arguments mean is written in fastflow/reference. The names tie a backward op to its
// forward op (autograd/signature.h).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastflow, m) {
  m.def(
      "planar_flow_forward(Tensor z, Tensor w, Tensor u, Tensor b, bool centred) "
      "-> (Tensor z_K, Tensor ladj, Tensor a)");
  m.def(
      "planar_flow_backward(Tensor dz_K, Tensor dladj, Tensor z, Tensor z_K, Tensor w, Tensor u, "
      "Tensor a, bool centred, bool param_grads) -> (Tensor dz, Tensor dw, Tensor du, Tensor db)");
  m.def(
      "planar_flow_inverse(Tensor z_K, Tensor w, Tensor u, Tensor b, bool centred) "
      "-> (Tensor z, Tensor ladj, Tensor a)");
  m.def(
      "planar_flow_inverse_backward(Tensor dz, Tensor dladj, Tensor z_K, Tensor z, Tensor w, "
      "Tensor u, Tensor a, bool centred, bool param_grads) "
      "-> (Tensor dz_K, Tensor dw, Tensor du, Tensor db)");

  // saved is what the backward of the same backend needs, empty if save is false; lists have an
  // entry per layer, of shape (0,) where there is nothing.
  m.def(
      "made_forward(Tensor x, Tensor[] terms, Tensor[] weights, Tensor[] biases, Tensor stairs, "
      "int activation, bool residual, bool save) -> (Tensor y, Tensor saved)");
  m.def(
      "made_backward(Tensor dy, Tensor x, Tensor saved, Tensor[] weights, Tensor stairs, "
      "int activation, bool residual, int terms_grad, int biases_given, bool x_grad, "
      "bool param_grads) "
      "-> (Tensor dx, Tensor[] dterms, Tensor[] dweights, Tensor[] dbiases)");
  m.def(
      "autoregressive_forward(Tensor x, Tensor[] terms, Tensor[] weights, Tensor[] biases, "
      "Tensor stairs, int activation, bool residual, int scale, float c0, float c1, bool save) "
      "-> (Tensor y, Tensor ladj, Tensor saved)");
  m.def(
      "autoregressive_backward(Tensor dy, Tensor dladj, Tensor x, Tensor saved, Tensor[] weights, "
      "Tensor stairs, int activation, bool residual, int scale, float c0, float c1, "
      "int terms_grad, int biases_given, bool x_grad, bool param_grads) "
      "-> (Tensor dx, Tensor[] dterms, Tensor[] dweights, Tensor[] dbiases)");
  // With what a context adds to the first level, V c + v or act(V c + v), computed inside; on CPUs
  // only, where small calls gain by it. So below, for the inverse.
  m.def(
      "autoregressive_context_forward(Tensor x, Tensor context, Tensor context_weight, "
      "Tensor? context_bias, bool context_activated, Tensor[] weights, Tensor[] biases, "
      "Tensor stairs, int activation, bool residual, int scale, float c0, float c1, bool save) "
      "-> (Tensor y, Tensor ladj, Tensor saved)");
  m.def(
      "autoregressive_context_backward(Tensor dy, Tensor dladj, Tensor x, Tensor context, "
      "Tensor saved, Tensor context_weight, bool context_bias_given, bool context_activated, "
      "Tensor[] weights, Tensor stairs, int activation, bool residual, int scale, float c0, "
      "float c1, int biases_given, bool x_grad, bool context_grad, bool param_grads) "
      "-> (Tensor dx, Tensor dcontext, Tensor dcontext_weight, Tensor dcontext_bias, "
      "Tensor[] dweights, Tensor[] dbiases)");
  m.def(
      "autoregressive_inverse(Tensor y, Tensor[] terms, Tensor[] weights, Tensor[] biases, "
      "Tensor stairs, int activation, bool residual, int scale, float c0, float c1, bool save) "
      "-> (Tensor x, Tensor ladj, Tensor saved)");
  m.def(
      "autoregressive_inverse_backward(Tensor dx, Tensor dladj, Tensor x, Tensor saved, "
      "Tensor[] weights, Tensor stairs, int activation, bool residual, int scale, float c0, "
      "float c1, int terms_grad, int biases_given, bool y_grad, bool param_grads) "
      "-> (Tensor dy, Tensor[] dterms, Tensor[] dweights, Tensor[] dbiases)");
  m.def(
      "autoregressive_context_inverse(Tensor y, Tensor context, Tensor context_weight, "
      "Tensor? context_bias, bool context_activated, Tensor[] weights, Tensor[] biases, "
      "Tensor stairs, int activation, bool residual, int scale, float c0, float c1, bool save) "
      "-> (Tensor x, Tensor ladj, Tensor saved)");
  m.def(
      "autoregressive_context_inverse_backward(Tensor dx, Tensor dladj, Tensor x, Tensor context, "
      "Tensor saved, Tensor context_weight, bool context_bias_given, bool context_activated, "
      "Tensor[] weights, Tensor stairs, int activation, bool residual, int scale, float c0, "
      "float c1, int biases_given, bool y_grad, bool context_grad, bool param_grads) "
      "-> (Tensor dy, Tensor dcontext, Tensor dcontext_weight, Tensor dcontext_bias, "
      "Tensor[] dweights, Tensor[] dbiases)");

  // net as `Network.tensors` of fastflow/reference/pcp_potential.py lays it out: matrices, and
  // terms (n,) or (B, n), which may be columns of a larger tensor. saved is what the backward of
  // the same backend needs, and may be empty if save is false.
  m.def(
      "pcp_forward(Tensor x, Tensor[] net, int layers, bool save) "
      "-> (Tensor y, Tensor ladj, Tensor[] saved)");
  m.def(
      "pcp_backward(Tensor dy, Tensor dladj, Tensor x, Tensor[] saved, Tensor[] net, int layers, "
      "bool param_grads) -> (Tensor dx, Tensor[] dnet)");
  m.def(
      "pcp_inverse(Tensor y, Tensor[] net, int layers, bool save) "
      "-> (Tensor x, Tensor ladj, Tensor[] saved)");
  m.def(
      "pcp_inverse_backward(Tensor dx, Tensor dladj, Tensor x, Tensor[] saved, Tensor[] net, "
      "int layers, bool param_grads) -> (Tensor dy, Tensor[] dnet)");
}
