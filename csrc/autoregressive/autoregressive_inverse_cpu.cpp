// Placeholder until the inverse sweep is there.
#include <stdexcept>

#include "autoregressive.h"

namespace fastflow {

void autoregressive_inverse_cpu(const AutoregressiveArgs&) {
  throw std::runtime_error("autoregressive_inverse is not there yet");
}
void autoregressive_inverse_backward_cpu(const AutoregressiveArgs&) {
  throw std::runtime_error("autoregressive_inverse_backward is not there yet");
}

}  // namespace fastflow
