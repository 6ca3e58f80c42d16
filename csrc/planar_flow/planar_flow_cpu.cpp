#include "planar_flow_cpu.h"

namespace fastflow {

void planar_flow_forward_cpu(const PlanarFlowArgs& args) {
  args.shared ? planar_flow_shared_forward_cpu(args) : planar_flow_amortised_forward_cpu(args);
}

void planar_flow_backward_cpu(const PlanarFlowArgs& args) {
  args.shared ? planar_flow_shared_backward_cpu(args) : planar_flow_amortised_backward_cpu(args);
}

}  // namespace fastflow
