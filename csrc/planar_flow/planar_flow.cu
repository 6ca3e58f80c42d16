// Entry points of the CUDA kernels of planar_flow: by kind of parameters and by type.
#include "planar_flow_device.cuh"

namespace fastflow {
namespace {

template <class T>
const char* run(bool backward, const PlanarFlowArgs& args, cudaStream_t cuda_stream) {
  Stream stream(cuda_stream);
  const Chain<T> chain(args);
  if (args.shared)
    shared(backward, chain, args.workspace, stream);
  else
    amortised(backward, chain, stream);
  return stream.error();
}

size_t workspace(const PlanarFlowArgs& args, bool backward) {
  if (!args.shared) return 0;
  return args.is_double ? shared_workspace_bytes(Chain<double>(args), backward)
                        : shared_workspace_bytes(Chain<float>(args), backward);
}

}  // namespace

const char* planar_flow_forward_cuda(const PlanarFlowArgs& args, cudaStream_t stream) {
  return args.is_double ? run<double>(false, args, stream) : run<float>(false, args, stream);
}

const char* planar_flow_backward_cuda(const PlanarFlowArgs& args, cudaStream_t stream) {
  return args.is_double ? run<double>(true, args, stream) : run<float>(true, args, stream);
}

size_t planar_flow_forward_cuda_workspace(const PlanarFlowArgs& args) {
  return workspace(args, false);
}

size_t planar_flow_backward_cuda_workspace(const PlanarFlowArgs& args) {
  return workspace(args, true);
}

}  // namespace fastflow
