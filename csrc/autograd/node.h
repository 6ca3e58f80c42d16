// The node that an op leaves in the autograd graph: it keeps the arguments and outputs of a forward
// op and calls the backward op. It knows no mathematics; see signature.h for what it goes by.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "signature.h"

namespace fastflow {

using at::Tensor;
using c10::IValue;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePointer = decltype(torch::autograd::Edge::function);
using Values = std::vector<IValue>;

// Whether a tensor is an array in memory and nothing else, and nobody listens to what is done with
// it: no subclass, wrapper or tangent, no mode, trace or transform. Only such tensors are for us.
inline bool plain(const Tensor& tensor) {
  constexpr c10::DispatchKeySet keys({c10::DispatchKey::CPU, c10::DispatchKey::CUDA,
                                      c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA,
                                      c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA,
                                      c10::DispatchKey::ADInplaceOrView});
  return (tensor.key_set().raw_repr() & ~keys.raw_repr()) == 0 && !tensor._fw_grad(0).defined();
}
inline bool unobserved() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included - c10::default_included_set - c10::autocast_dispatch_keyset).empty();
}

// Calls visit(tensor) on the tensors of a value: one, those of a list, or none.
template <class Visit>
void each_tensor(const IValue& value, Visit visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const IValue& item : value.toListRef()) visit(item.toTensor());
  }
}

// Whether vmap or another transform of functions looks on: kernels would answer it slowly, or not.
inline bool transformed(const Tensor& tensor) {
  return tensor.key_set().has_any(
      c10::DispatchKeySet({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                           c10::DispatchKey::FuncTorchGradWrapper}));
}
inline bool transforming() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// A backward pass in Python, for what the backward op cannot do: batched cotangents, and gradients
// that are to be differentiated again. Its arguments: those of the forward op, its outputs as far
// as backward needs them, the cotangents, and for every tensor whether its gradient is wanted.
using PythonBackward =
    std::function<variable_list(const Values& arguments, const Values& outputs,
                                const variable_list& cotangents, const std::vector<bool>& wanted)>;

struct Op {
  Signature signature;
  PythonBackward python;
};

// An argument or an output, its tensors kept as autograd keeps them: with version and hooks.
class Kept {
 public:
  Kept(const IValue& value, bool is_output) : list_(value.isTensorList()) {
    each_tensor(value, [&](const Tensor& tensor) { tensors_.emplace_back(tensor, is_output); });
    if (tensors_.empty() && !list_) value_ = value;
  }
  // What was kept. Hooks on saved tensors may return other strides than they were given.
  IValue get(const NodePointer& node) const {
    if (list_) {
      c10::List<Tensor> list;
      for (const auto& tensor : tensors_) list.push_back(tensor.unpack(node).contiguous());
      return list;
    }
    return tensors_.empty() ? value_ : IValue(tensors_[0].unpack(node).contiguous());
  }
  size_t count() const { return tensors_.size(); }
  void release() {
    for (auto& tensor : tensors_) tensor.reset_data();
  }

 private:
  bool list_;
  IValue value_;
  c10::SmallVector<SavedVariable, 1> tensors_;
};

class OpNode : public torch::autograd::Node {
 public:
  OpNode(const Op& op, const Values& arguments) : op_(op) {
    arguments_.reserve(arguments.size());
    for (const IValue& argument : arguments) {
      arguments_.emplace_back(argument, false);
      each_tensor(argument, [&](const Tensor& tensor) {
        add_next_edge(tensor.requires_grad() ? torch::autograd::impl::gradient_edge(tensor)
                                             : torch::autograd::Edge());
      });
    }
  }

  std::string name() const override { return op_.signature.backward.schema().name(); }

  // The outputs that a caller sees get this node as their history; those that backward needs are
  // kept, and no other: ladj may be changed in place.
  void finish(const NodePointer& self, const Values& outputs) {
    outputs_.reserve(outputs.size());
    for (size_t i = 0; i < outputs.size(); ++i) {
      const bool seen = i < op_.signature.visible;
      if (seen) torch::autograd::set_history(outputs[i].toTensor(), self);
      outputs_.emplace_back(op_.signature.needs_output(i) ? outputs[i] : IValue(), seen);
    }
  }

  variable_list apply(variable_list&& cotangents) override {
    bool in_python = at::GradMode::is_enabled() || transforming();
    for (size_t i = 0; i < cotangents.size(); ++i) {
      if (!cotangents[i].defined()) cotangents[i] = input_metadata(i).zeros_like();
      in_python = in_python || transformed(cotangents[i]);
    }
    std::vector<bool> wanted(num_outputs());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    const auto [arguments, outputs] = unpack();
    return in_python ? op_.python(arguments, outputs, cotangents, wanted)
                     : run(arguments, outputs, cotangents, wanted);
  }

  void compiled_args(torch::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, name(), ": compiled autograd needs the node in Python; set FASTFLOW_NODE=0");
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& kept : arguments_) kept.release();
    for (auto& kept : outputs_) kept.release();
  }

 private:
  std::pair<Values, Values> unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);  // against release_variables
    const NodePointer self = getptr();
    std::pair<Values, Values> values;
    for (const auto& kept : arguments_) values.first.push_back(kept.get(self));
    for (const auto& kept : outputs_) values.second.push_back(kept.get(self));
    return values;
  }

  variable_list run(const Values& arguments, const Values& outputs, const variable_list& cotangents,
                    const std::vector<bool>& wanted) const {
    using From = Signature::From;
    const Signature& signature = op_.signature;
    Values stack;
    stack.reserve(signature.sources.size());
    for (const auto [from, index] : signature.sources) {
      if (from == From::cotangent)
        stack.emplace_back(cotangents[index].contiguous());
      else if (from == From::grad)
        stack.push_back(flags(arguments[index], &wanted, first(index)));
      else if (from == From::given)
        stack.push_back(flags(arguments[index], nullptr, 0));
      else if (from == From::param_grads)
        stack.emplace_back(param_grads(wanted));
      else
        stack.push_back(from == From::output ? outputs[index] : arguments[index]);
    }
    {
      const at::AutoDispatchBelowAutograd below;
      signature.backward.callBoxed(stack);
    }
    variable_list gradients(wanted.size());
    for (size_t i = 0; i < stack.size(); ++i) {
      const size_t argument = signature.gradients[i];
      size_t place = first(argument);
      const size_t end = place + arguments_[argument].count();
      // where no gradient is wanted the op has returned nothing of worth, or more than there is
      each_tensor(stack[i], [&](const Tensor& gradient) {
        if (place < end && wanted[place]) gradients[place] = gradient;
        ++place;
      });
    }
    return gradients;
  }

  // The place of an argument's first tensor among all tensors.
  size_t first(size_t argument) const {
    size_t place = 0;
    for (size_t before = 0; before < argument; ++before) place += arguments_[before].count();
    return place;
  }

  // A bit for every tensor of a list that is not of shape (0,) and, if asked, is wanted; a bool for
  // a tensor.
  static IValue flags(const IValue& argument, const std::vector<bool>* wanted, size_t place) {
    int64_t bits = 0, bit = 1;
    each_tensor(argument, [&](const Tensor& tensor) {
      const bool given = tensor.dim() != 1 || tensor.numel() != 0;
      if (given && (!wanted || (*wanted)[place])) bits |= bit;
      bit <<= 1;
      ++place;
    });
    return argument.isTensorList() ? IValue(bits) : IValue(bits != 0);
  }

  bool param_grads(const std::vector<bool>& wanted) const {
    size_t place = 0;
    for (size_t i = 0; i < arguments_.size(); ++i)
      for (size_t j = 0; j < arguments_[i].count(); ++j, ++place)
        if (place && wanted[place] && !op_.signature.has_flag(i)) return true;
    return false;
  }

  const Op& op_;
  std::vector<Kept> arguments_, outputs_;
};

// Torch 2.11 holds nodes by std::shared_ptr, later ones by c10::intrusive_ptr.
template <class Pointer = NodePointer>
Pointer make_node(const Op& op, const Values& arguments) {
  torch::autograd::Node* node = new OpNode(op, arguments);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return Pointer(node, [](auto* dead) { deleteNode(dead); });
  else
    return Pointer::unsafe_steal_from_new(node);
}

}  // namespace fastflow
