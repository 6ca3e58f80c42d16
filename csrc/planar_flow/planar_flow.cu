// Entry points of the CUDA kernels of planar_flow: by kind of parameters and by type.
#include "planar_flow_device.cuh"

namespace fastflow {
namespace {

template <class T>
const char* forward(const PlanarFlowArgs& args, cudaStream_t cuda_stream) {
  Stream stream(cuda_stream);
  const Chain<T> chain(args);
  if (args.shared)
    shared_forward(chain, args.workspace, stream);
  else
    amortised_forward(chain, stream);
  return stream.error();
}

template <class T>
const char* backward(const PlanarFlowArgs& args, cudaStream_t cuda_stream) {
  Stream stream(cuda_stream);
  const Chain<T> chain(args);
  if (args.shared)
    shared_backward(chain, args.workspace, stream);
  else
    amortised_backward(chain, stream);
  return stream.error();
}

size_t workspace(const PlanarFlowArgs& args, bool backward) {
  if (!args.shared) return 0;
  return args.is_double ? shared_workspace_bytes(Chain<double>(args), backward)
                        : shared_workspace_bytes(Chain<float>(args), backward);
}

}  // namespace

const char* planar_flow_forward_cuda(const PlanarFlowArgs& args, cudaStream_t stream) {
  return args.is_double ? forward<double>(args, stream) : forward<float>(args, stream);
}

const char* planar_flow_backward_cuda(const PlanarFlowArgs& args, cudaStream_t stream) {
  return args.is_double ? backward<double>(args, stream) : backward<float>(args, stream);
}

size_t planar_flow_forward_cuda_workspace(const PlanarFlowArgs& args) {
  return workspace(args, false);
}

size_t planar_flow_backward_cuda_workspace(const PlanarFlowArgs& args) {
  return workspace(args, true);
}

}  // namespace fastflow
