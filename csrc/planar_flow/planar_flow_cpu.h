// The two CPU implementations behind planar_flow_forward_cpu and planar_flow_backward_cpu.
#pragma once

#include "planar_flow.h"

namespace fastflow {

void planar_flow_shared_forward_cpu(const PlanarFlowArgs& args);
void planar_flow_shared_backward_cpu(const PlanarFlowArgs& args);
void planar_flow_amortised_forward_cpu(const PlanarFlowArgs& args);
void planar_flow_amortised_backward_cpu(const PlanarFlowArgs& args);

}  // namespace fastflow
