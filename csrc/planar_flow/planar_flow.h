// Argument struct and launchers of the op planar_flow. Plain pointers and sizes: no torch header,
// no CUDA header, so that the binding, the CPU kernels and the .cu file can all include it.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace fastflow {

// Every pointer is to contiguous memory of one dtype (float or double). Shapes: B batch, D
// features, K steps; parameters are (K, D), (K, D), (K) when shared, else (B, K, D), (B, K, D),
// (B, K). `in` and `out` are the op's input and output in the direction that is run: for the
// inverse `in` is z_K and `out` is z.
struct PlanarFlowArgs {
  int64_t batch;
  int64_t features;
  int64_t steps;
  bool shared;
  bool centred;
  bool inverse;
  bool param_grads;  // backward: false leaves dw, du, db unset
  bool is_double;

  const void* in;  // (B, D)
  const void* w;
  const void* u;
  const void* b;  // forward only

  // Written by forward, read by backward (ladj: forward only).
  void* out;   // (B, D)
  void* ladj;  // (B)
  void* a;     // (B, K)

  // Backward only.
  const void* d_out;  // (B, D)
  const void* dladj;  // (B)
  void* d_in;         // (B, D)
  void* dw;
  void* du;
  void* db;

  void* workspace;  // CUDA only: device memory of the size that the query below returns
};

// B, D, K >= 1.
void planar_flow_forward_cpu(const PlanarFlowArgs& args);
void planar_flow_backward_cpu(const PlanarFlowArgs& args);

// Enqueue on the stream; return nullptr, or the text of a CUDA error.
const char* planar_flow_forward_cuda(const PlanarFlowArgs& args, CUstream_st* stream);
const char* planar_flow_backward_cuda(const PlanarFlowArgs& args, CUstream_st* stream);
// Bytes of workspace that the launchers above need; the contents need no initialisation.
size_t planar_flow_forward_cuda_workspace(const PlanarFlowArgs& args);
size_t planar_flow_backward_cuda_workspace(const PlanarFlowArgs& args);

}  // namespace fastflow
