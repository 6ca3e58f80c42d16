// How a backward op belongs to its forward op. Their schemas say it all, by the names in them:
//
//   forward(Tensor z, Tensor w, bool centred) -> (Tensor y, Tensor ladj, Tensor a)
//   backward(Tensor dy, Tensor dladj, Tensor z, Tensor y, Tensor w, Tensor a, bool centred,
//            bool param_grads) -> (Tensor dz, Tensor dw)
//
// An argument of backward is
//   - a cotangent of forward's output (dy): they come first, and make those outputs the ones that a
//     caller sees;
//   - an output (y, a) or an argument (z, w, centred);
//   - w_grad: whether the gradient of argument w is wanted; of a list, a bit for every tensor in
//   it;
//   - w_given: a bit for every tensor in the list w, set unless its shape is (0,), which is how a
//     list says that there is none; of an optional tensor, a bool;
//   - param_grads: whether any gradient is wanted that has no such flag, the first tensor's aside.
// The results of backward are gradients of arguments. Tensor[] may stand wherever Tensor does,
// except for outputs. An argument of forward called save says whether backward may come; the node
// sets it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <vector>

namespace fastflow {

struct Signature {
  enum class From { cotangent, output, argument, grad, given, param_grads };
  struct Source {
    From from;
    size_t index;  // of the cotangent, output or argument
  };

  Signature(const std::string& forward_name, const std::string& backward_name)
      : forward(find(forward_name)), backward(find(backward_name)) {
    const auto& inputs = forward.schema().arguments();
    const auto& outputs = forward.schema().returns();
    visible = 0;
    save = position(inputs, "save");
    for (const auto& argument : backward.schema().arguments()) {
      const std::string& name = argument.name();
      if (visible < outputs.size() && name == "d" + outputs[visible].name())
        sources.push_back({From::cotangent, visible++});
      else if (name == "param_grads")
        sources.push_back({From::param_grads, 0});
      else if (const size_t i = position(outputs, name); i < outputs.size())
        sources.push_back({From::output, i});
      else if (const size_t i = position(inputs, stem(name, "_grad")); i < inputs.size())
        sources.push_back({From::grad, i});
      else if (const size_t i = position(inputs, stem(name, "_given")); i < inputs.size())
        sources.push_back({From::given, i});
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
  bool has_flag(size_t argument) const {
    for (const Source& source : sources)
      if (source.from == From::grad && source.index == argument) return true;
    return false;
  }

  c10::OperatorHandle forward, backward;
  size_t visible;                 // how many of forward's outputs, the first ones, a caller sees
  size_t save;                    // the argument of that name, or how many there are
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
  // The name without its end, or nothing if it has another one.
  static std::string stem(const std::string& name, const std::string& end) {
    const bool ends = name.size() > end.size() && name.substr(name.size() - end.size()) == end;
    return ends ? name.substr(0, name.size() - end.size()) : "";
  }
  size_t require(const std::vector<c10::Argument>& list, const std::string& name) const {
    const size_t i = position(list, name);
    TORCH_CHECK(i < list.size(), backward.schema().name(), " speaks of ", name,
                ", which is no argument or output of ", forward.schema().name());
    return i;
  }
};

}  // namespace fastflow
