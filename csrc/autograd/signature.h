// How a backward op belongs to its forward op. Their schemas say it all, by the names in them:
//
//   forward(Tensor z, Tensor w, bool centred) -> (Tensor y, Tensor ladj, Tensor a)
//   backward(Tensor dy, Tensor dladj, Tensor z, Tensor y, Tensor w, Tensor a, bool centred,
//            bool param_grads) -> (Tensor dz, Tensor dw)
//
// An argument of backward is a cotangent of forward's output (dy: they come first, and make those
// outputs the ones that a caller sees), an output (y, a), an argument (z, w, centred), or
// param_grads: whether any gradient but that of the first tensor is wanted. The results of backward
// are gradients of arguments. Tensor[] may stand wherever Tensor does, except for outputs.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <vector>

namespace fastflow {

struct Signature {
  enum class From { cotangent, output, argument, param_grads };
  struct Source {
    From from;
    size_t index;  // of the cotangent, output or argument
  };

  Signature(const std::string& forward_name, const std::string& backward_name)
      : forward(find(forward_name)), backward(find(backward_name)) {
    const auto& inputs = forward.schema().arguments();
    const auto& outputs = forward.schema().returns();
    visible = 0;
    for (const auto& argument : backward.schema().arguments()) {
      const std::string& name = argument.name();
      if (visible < outputs.size() && name == "d" + outputs[visible].name())
        sources.push_back({From::cotangent, visible++});
      else if (name == "param_grads")
        sources.push_back({From::param_grads, 0});
      else if (const size_t i = position(outputs, name); i < outputs.size())
        sources.push_back({From::output, i});
      else
        sources.push_back({From::argument, require(inputs, name)});
    }
    for (const auto& gradient : backward.schema().returns()) {
      TORCH_CHECK(gradient.name().rfind('d', 0) == 0, backward_name, ": a result is named ",
                  gradient.name(), ", must be d and the name of an argument of ", forward_name);
      gradients.push_back(require(inputs, gradient.name().substr(1)));
    }
  }

  bool needs_output(size_t i) const {
    for (const Source& source : sources)
      if (source.from == From::output && source.index == i) return true;
    return false;
  }

  c10::OperatorHandle forward, backward;
  size_t visible;                 // how many of forward's outputs, the first ones, a caller sees
  std::vector<Source> sources;    // of every argument of backward
  std::vector<size_t> gradients;  // for every result of backward, the argument it is a gradient of

 private:
  static c10::OperatorHandle find(const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  }
  static size_t position(const std::vector<c10::Argument>& list, const std::string& name) {
    size_t i = 0;
    while (i < list.size() && list[i].name() != name) ++i;
    return i;
  }
  size_t require(const std::vector<c10::Argument>& list, const std::string& name) const {
    const size_t i = position(list, name);
    TORCH_CHECK(i < list.size(), backward.schema().name(), " speaks of ", name,
                ", which is no argument or output of ", forward.schema().name());
    return i;
  }
};

}  // namespace fastflow
