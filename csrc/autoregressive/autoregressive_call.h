// A call of the ops on masked networks: what a binding makes of the tensors that come, checked, and
// what the kernels get to see of them.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../common/bind.h"
#include "autoregressive.h"

namespace fastflow {

#ifdef FASTFLOW_CUDA
inline constexpr bool kOnDevice = true;
#else
inline constexpr bool kOnDevice = false;
#endif

using Tensors = std::vector<Tensor>;

inline void check(bool good, const char* name, const char* what = "") {
  STD_TORCH_CHECK(good, "autoregressive: ", name, what);
}

inline void check_place(const Tensor& tensor, const char* name, const Tensor& first) {
  fastflow::check_place("autoregressive", tensor, name, first);
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& first, Shape shape) {
  fastflow::check_like("autoregressive", tensor, name, first, shape);
}

// The stairs of a call, level by level. What they hold is checked where the host can read it.
class Stairs {
 public:
  Stairs(const Tensor& stairs, const Tensor& x) : next_(nullptr) {
    check(stairs.scalar_type() == ScalarType::Int && stairs.dim() == 1,
          "stairs must be a vector of int32");
    check_place(stairs, "stairs", x);
    next_ = static_cast<const int32_t*>(stairs.data_ptr());
    end_ = next_ + stairs.size(0);
  }
  const int32_t* order(int64_t n) {
    const int32_t* order = take(n);
    if (kOnDevice) return order;
    seen_.assign(size_t(n), false);
    for (int64_t k = 0; k < n; ++k) {
      check(order[k] >= 0 && order[k] < n && !seen_[size_t(order[k])],
            "stairs: an order must be a permutation");
      seen_[size_t(order[k])] = true;
    }
    return order;
  }
  const int32_t* prefix(int64_t n, int64_t columns) {
    const int32_t* prefix = take(n);
    if (kOnDevice) return prefix;
    for (int64_t k = 0; k < n; ++k)
      check(prefix[k] >= (k ? prefix[k - 1] : 0) && prefix[k] <= columns,
            "stairs: prefixes must be between 0 and the units of the level before, and must not "
            "decrease");
    return prefix;
  }
  void finish() const { check(next_ == end_, "stairs has the wrong length"); }

 private:
  const int32_t* take(int64_t n) {
    check(end_ - next_ >= n, "stairs has the wrong length");
    const int32_t* taken = next_;
    next_ += n;
    return taken;
  }
  const int32_t* next_;
  const int32_t* end_;
  std::vector<bool> seen_;
};

// The network of a call as the kernels see it; the tensors it points to outlive it.
struct Call {
  AutoregressiveArgs args{};
  std::vector<MaskedLayer> layers;
  ContextLayer context{};

  Call(const Tensor& x, const Tensors& weights, const Tensor& stairs, int64_t activation,
       bool residual) {
    const auto dtype = x.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double,
          "the first argument must be float32 or float64");
    check(x.dim() == 2 && x.size(0) >= 1 && x.size(1) >= 1,
          "the first argument must have shape (B, D), both at least 1");
    check(!weights.empty(), "weights must not be empty");
    check(activation >= 0 && activation <= int64_t(Activation::leaky_relu),
          "activation must be between 0 and 6");
    args.batch = x.size(0);
    args.features = x.size(1);
    args.layer_count = int64_t(weights.size());
    args.activation = Activation(activation);
    args.residual = residual;
    args.is_double = dtype == ScalarType::Double;
    check_like(x, "the first argument", x, {args.batch, args.features});

    Stairs levels(stairs, x);
    int64_t columns = args.features;
    const int32_t* column_order = levels.order(columns);
    for (const Tensor& weight : weights) {
      check(weight.dim() == 2 && weight.size(0) >= 1, "weights must have 2 dimensions, none empty");
      MaskedLayer layer{};
      layer.rows = weight.size(0);
      layer.columns = columns;
      check_like(weight, "a weight", x, {layer.rows, columns});
      layer.order = levels.order(layer.rows);
      layer.prefix = levels.prefix(layer.rows, columns);
      layer.column_order = column_order;
      layer.weight = weight.data_ptr();
      layers.push_back(layer);
      columns = layer.rows;
      column_order = layer.order;
    }
    levels.finish();
    if (residual) {
      check(args.layer_count % 2 == 0, "a residual network has an odd number of hidden layers");
      for (int64_t l = 1; l + 1 < args.layer_count; ++l)
        check(layers[size_t(l)].rows == layers[0].rows,
              "the hidden layers of a residual network must have equal sizes");
    }
    args.layers = layers.data();
  }

#ifndef FASTFLOW_CUDA  // there the stairs are out of reach
  // Refuses stairs that the network cannot have: an output of an affine op that sees its own
  // feature or a later one, and residual blocks that add levels of different units.
  void check_dependence() const {
    for (size_t l = 2; args.residual && l + 1 < layers.size(); l += 2)
      check(std::equal(layers[l].order, layers[l].order + layers[l].rows, layers[l - 2].order),
            "stairs: a residual block adds levels of different order");
    if (!args.affine) return;
    std::vector<int64_t> known(layers.size(), 0);  // units that the features before r make known
    for (int64_t r = 0; r < args.features; ++r) {
      int64_t below = r;
      for (size_t l = 0; l + 1 < layers.size(); ++l) {
        const MaskedLayer& layer = layers[l];
        while (known[l] < layer.rows && layer.prefix[known[l]] <= below) ++known[l];
        if (args.residual && l >= 2 && l % 2 == 0) {  // a block adds what it began with
          known[l] = std::min(known[l], known[l - 2]);
          check(known[l] == known[l - 2], "stairs: a residual block adds levels of other degrees");
        }
        below = known[l];
      }
      check(layers.back().prefix[2 * r + 1] <= below,
            "stairs: an output sees its own feature or a later one");
    }
  }
#endif

  void set_scale(int64_t scale, double c0, double c1) {
    check(scale >= 0 && scale <= int64_t(Scale::gate), "scale must be between 0 and 4");
    check(args.outputs() == 2 * args.features, "the network must have 2 D outputs");
    args.affine = true;
    args.scale = Scale(scale);
    args.c0 = c0;
    args.c1 = c1;
  }

  void set_parameters(const Tensor& x, const Tensors& terms, const Tensors& biases) {
    check(terms.empty() || terms.size() == layers.size(),
          "terms must be empty or have an entry per layer");
    check(biases.size() == layers.size(), "biases must have an entry per layer");
    for (size_t l = 0; l < layers.size(); ++l) {
      MaskedLayer& layer = layers[l];
      if (biases[l].numel()) {
        check_like(biases[l], "a bias", x, {layer.rows});
        layer.bias = biases[l].data_ptr();
      }
      if (!terms.empty() && terms[l].numel()) {
        check_like(terms[l], "a term", x, {args.batch, layer.rows});
        layer.term = terms[l].data_ptr();
      }
    }
  }
#ifndef FASTFLOW_CUDA
  void set_context(const Tensor& x, const Tensor& values, const Tensor& weight, bool activated) {
    check(values.dim() == 2 && values.size(1) >= 1, "the context must have shape (B, C), C >= 1");
    MaskedLayer& layer = context.layer;
    layer.rows = layers[0].rows;
    layer.columns = values.size(1);
    check_like(values, "the context", x, {args.batch, layer.columns});
    check_like(weight, "the context's weight", x, {layer.rows, layer.columns});
    all_.assign(size_t(layer.rows), int32_t(layer.columns));
    natural_.resize(size_t(layer.columns));
    std::iota(natural_.begin(), natural_.end(), 0);
    layer.order = layers[0].order;
    layer.prefix = all_.data();
    layer.column_order = natural_.data();
    layer.weight = weight.data_ptr();
    context.activated = activated;
    context.values = values.data_ptr();
    args.context = &context;
  }
#endif

 private:
  std::vector<int32_t> all_, natural_;  // the context's staircase
};

}  // namespace fastflow
