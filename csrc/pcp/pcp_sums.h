// The gradients of what all rows share, as sums over the batch.
#pragma once

#include <algorithm>
#include <vector>

#include "pcp.h"

namespace fastflow {

// Lays out the sums of some rows of the batch, one tensor after the other.
template <class T>
class SharedSums {
 public:
  explicit SharedSums(const PcpArgs& args) : args_(args), base_(args.net) {
    for (int64_t i = 0; i < args.tensors(); ++i) {
      places_.push_back(size_);
      if (args.param_grads && args.net[i].shared) size_ += args.net[i].size;
    }
  }
  int64_t size() const { return size_; }
  int64_t place(const PcpTensor& tensor) const { return places_[size_t(&tensor - base_)]; }
  // The gradients, of the sums of all chunks.
  void finish(const T* sums, int64_t chunks) const {
    for (int64_t i = 0; i < args_.tensors(); ++i) {
      const PcpTensor& tensor = args_.net[i];
      if (!tensor.shared) continue;
      T* grad = static_cast<T*>(tensor.grad);
      std::copy_n(sums + place(tensor), tensor.size, grad);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const T* more = sums + chunk * size_ + place(tensor);
        for (int64_t e = 0; e < tensor.size; ++e) grad[e] += more[e];
      }
    }
  }

 private:
  const PcpArgs& args_;
  const PcpTensor* base_;
  std::vector<int64_t> places_;
  int64_t size_ = 0;
};

}  // namespace fastflow
