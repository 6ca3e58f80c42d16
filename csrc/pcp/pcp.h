// Argument struct and launchers of the op pcp. Plain pointers and sizes: no torch header, so that
// the binding and the kernels can both include it.
#pragma once

#include <cstdint>

namespace fastflow {

// A tensor of the network: a matrix, or a term (n,), both the same for all rows, or a term (B, n).
struct PcpTensor {
  const void* data;
  int64_t size;    // elements, of one row unless shared
  int64_t stride;  // elements from row to row of the batch
  bool shared;
  void* grad;  // backward: contiguous
};

// Memory is contiguous and of one dtype (float or double) unless a stride is given. Letters as in
// fastflow/reference/pcp_potential.py: B batch, D features, K layers of H_k units. For the inverse
// `in` is y and `out` is x.
struct PcpArgs {
  int64_t batch;
  int64_t features;
  int64_t layers;
  const int64_t* widths;  // (K)
  const PcpTensor* net;   // as `Network.tensors` lays them out
  bool conditional;       // has gates and scales; else all are 1
  bool inverse;
  bool param_grads;  // backward: false leaves the `grad` of the net unset
  bool is_double;

  const void* in;  // (B, D), forward only
  void* out;       // (B, D), forward only
  void* ladj;      // (B), forward only

  // Backward only.
  const void* x;      // (B, D), in either direction
  const void* d_out;  // (B, D)
  const void* dladj;  // (B)
  void* d_in;         // (B, D)

  // U_k and W_k, t_k, r, shift, curvature, a_k and b_k, counted from 0: no W_0 and no a_0.
  const PcpTensor& input(int64_t k) const { return net[k]; }
  const PcpTensor& weight(int64_t k) const { return net[layers + k - 1]; }
  const PcpTensor& offset(int64_t k) const { return net[2 * layers - 1 + k]; }
  const PcpTensor& slope() const { return net[3 * layers - 1]; }
  const PcpTensor& shift() const { return net[3 * layers]; }
  const PcpTensor& curvature() const { return net[3 * layers + 1]; }
  const PcpTensor& gate(int64_t k) const { return net[3 * layers + 1 + k]; }
  const PcpTensor& scale(int64_t k) const { return net[4 * layers + 1 + k]; }
  int64_t tensors() const { return conditional ? 5 * layers + 1 : 3 * layers + 2; }
};

// B >= 0; D, K and all widths >= 1.
void pcp_forward_cpu(const PcpArgs& args);
void pcp_inverse_cpu(const PcpArgs& args);
void pcp_backward_cpu(const PcpArgs& args);

}  // namespace fastflow
