// The Python module of the autograd node: define(...) makes a callable of an op, which runs it in
// plain eager mode, derivative included, and answers None wherever the Python path must take over.
//
// This is the one library that uses neither PyTorch's stable ABI nor an ABI of many Pythons; it
// serves only the torch and the Python that it was compiled for, and the package does without it.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cctype>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "node.h"

namespace fastflow {
namespace {

// The sizes of every argument, as letters: "BD KD KD K". Each letter is one size, 1 at least, the
// same wherever it stands. Arguments with letters are contiguous and of one type, float32 or
// float64; "*" is anything, which the op itself checks. A bar stands between alternatives.
//
// Brackets make it a list, and [..]? a list of which tensors, or all, may be missing. A small
// letter is a series of sizes, one for each tensor of a list, and n' the size before n in it;
// outside of lists n is the size before the first. So the layers of a network that maps (B, n)
// points, with an optional bias each: "Bn [nn'] [n]?".
using Shapes = std::vector<std::string>;

struct BoundOp {
  Op op;
  std::vector<Shapes> shapes;  // any of them
};

std::vector<Shapes> parse(const std::string& text, const Signature& signature) {
  std::vector<Shapes> all(1);
  std::istringstream words(text);
  for (std::string word; words >> word;)
    if (word == "|")
      all.emplace_back();
    else
      all.back().push_back(word);
  for (const Shapes& shapes : all)
    TORCH_CHECK(shapes.size() == signature.forward.schema().arguments().size(),
                signature.forward.schema().name(), ": shapes are '", text,
                "', must have a word for every argument");
  return all;
}

// How lists say that there is no tensor.
bool is_missing(const Tensor& tensor) { return tensor.dim() == 1 && tensor.numel() == 0; }

// Compares arguments with shapes, and learns on the way what the letters stand for.
class Fitting {
 public:
  bool fits(const std::string& shape, const IValue& argument) {
    if (shape == "*") return true;
    if (shape[0] != '[') return argument.isTensor() && fits(shape, argument.toTensor(), 0);
    if (!argument.isTensorList()) return false;
    const auto list = argument.toListRef();
    const size_t end = shape.find(']');
    const bool optional = end + 1 < shape.size();
    if (list.empty()) return optional;
    if (count_ == 0) count_ = list.size();
    if (list.size() != count_) return false;
    const std::string each = shape.substr(1, end - 1);
    for (size_t i = 0; i < list.size(); ++i) {
      const Tensor& tensor = list[i].toTensor();
      if (!(is_missing(tensor) && optional) && !fits(each, tensor, i + 1)) return false;
    }
    return true;
  }

 private:
  bool fits(const std::string& shape, const Tensor& tensor, size_t place) {
    if (!dtype_) dtype_ = tensor.scalar_type();
    if (*dtype_ != at::kFloat && *dtype_ != at::kDouble) return false;
    if (tensor.scalar_type() != *dtype_ || !tensor.is_contiguous()) return false;
    size_t dim = 0;
    for (size_t i = 0; i < shape.size(); ++i, ++dim) {
      const char letter = shape[i];
      const bool before = i + 1 < shape.size() && shape[i + 1] == '\'';
      i += before;
      if (dim >= size_t(tensor.dim())) return false;
      const int64_t found = tensor.size(int64_t(dim));
      int64_t& size = size_of(letter, std::islower(letter) ? place - before : 0);
      if (size == 0) size = found;
      if (found < 1 || found != size) return false;
    }
    return dim == size_t(tensor.dim());
  }

  int64_t& size_of(char letter, size_t place) {
    for (Size& known : sizes_)
      if (known.letter == letter && known.place == place) return known.size;
    sizes_.push_back({letter, place, 0});
    return sizes_.back().size;
  }

  struct Size {
    char letter;
    size_t place;  // in the series
    int64_t size;
  };
  c10::SmallVector<Size, 16> sizes_;
  std::optional<c10::ScalarType> dtype_;
  size_t count_ = 0;  // of the tensors in a list
};

bool fits(const Shapes& shapes, const Values& arguments) {
  Fitting fitting;
  for (size_t i = 0; i < shapes.size(); ++i)
    if (!fitting.fits(shapes[i], arguments[i])) return false;
  return true;
}

// Whether kernels take these arguments as they are: plain, of one device, and as `shapes` says.
bool ready(const BoundOp& bound, const Values& arguments) {
  std::optional<c10::Device> device;
  bool all = true;
  for (const IValue& argument : arguments)
    each_tensor(argument, [&](const Tensor& tensor) {
      if (!device) device = tensor.device();
      all = all && plain(tensor) && tensor.device() == *device;
    });
  if (!all) return false;  // and do not ask a tensor for sizes that has none, such as a nested one
  return std::any_of(bound.shapes.begin(), bound.shapes.end(),
                     [&](const Shapes& shapes) { return fits(shapes, arguments); });
}

// ---------------------------------------------------------------- Python to C++ and back

// A value of Python as an argument: a tensor that is no subclass, a number, None, a list of
// tensors. None in a list becomes a tensor of shape (0,), like `first` in all else; a tensor of
// this shape would say what it does not mean, and is for Python to refuse.
std::optional<IValue> from_python(PyObject* object, const Tensor& first) {
  if (THPVariable_CheckExact(object)) return IValue(THPVariable_Unpack(object));
  if (object == Py_None) return IValue();
  if (PyBool_Check(object)) return IValue(object == Py_True);
  if (PyFloat_CheckExact(object)) return IValue(PyFloat_AS_DOUBLE(object));
  if (PyLong_CheckExact(object)) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow ? std::nullopt : std::optional<IValue>(int64_t(value));
  }
  if (!PyList_CheckExact(object) && !PyTuple_CheckExact(object)) return std::nullopt;
  c10::List<Tensor> list;
  Tensor missing;  // one for all places
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(object, i);
    if (item == Py_None) {
      if (!missing.defined()) missing = at::empty({0}, first.options());
      list.push_back(missing);
    } else if (THPVariable_CheckExact(item)) {
      list.push_back(THPVariable_Unpack(item));
      if (is_missing(list.get(list.size() - 1))) return std::nullopt;
    } else {
      return std::nullopt;
    }
  }
  return IValue(list);
}

py::object to_python(const Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}
py::object to_python(const IValue& value) {
  if (value.isTensor()) return to_python(value.toTensor());
  if (value.isBool()) return py::bool_(value.toBool());
  if (value.isInt()) return py::int_(value.toInt());
  if (value.isDouble()) return py::float_(value.toDouble());
  if (value.isNone()) return py::none();
  py::list list;
  each_tensor(value, [&](const Tensor& tensor) { list.append(to_python(tensor)); });
  return list;
}
template <class Items>
py::tuple tuple_of(const Items& items) {
  py::tuple tuple(items.size());
  for (size_t i = 0; i < items.size(); ++i) tuple[i] = to_python(items[i]);
  return tuple;
}

// A Python callable as a backward pass. Nodes outlive any scope, so ops and callables live forever.
PythonBackward python_backward(PyObject* callable) {
  Py_INCREF(callable);
  return [callable](const Values& arguments, const Values& outputs, const variable_list& cotangents,
                    const std::vector<bool>& wanted) {
    const py::gil_scoped_acquire gil;
    py::tuple flags(wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) flags[i] = py::bool_(bool(wanted[i]));
    const py::tuple values =
        py::make_tuple(tuple_of(arguments), tuple_of(outputs), tuple_of(cotangents), flags);
    const auto result =
        py::reinterpret_steal<py::object>(PyObject_CallObject(callable, values.ptr()));
    if (!result) {
      python_error error;
      error.persist();
      throw std::move(error);
    }
    variable_list gradients;
    for (const py::handle gradient : result)
      gradients.push_back(gradient.is_none() ? Tensor() : THPVariable_Unpack(gradient.ptr()));
    TORCH_CHECK(gradients.size() == wanted.size(), "a backward in Python gave ", gradients.size(),
                " gradients, must give one for each of ", wanted.size(), " tensors");
    return gradients;
  };
}

// ---------------------------------------------------------------- the functions of the module

constexpr const char* CAPSULE = "fastflow.op";

// Runs the op; leaves its outputs, those that a caller sees, in `values`. False if it refused its
// arguments, with nothing done: Python knows what to say about them.
bool run(const Op& op, Values& values) {
  bool recorded = false;
  if (at::GradMode::is_enabled())
    for (const IValue& value : values)
      each_tensor(value, [&](const Tensor& tensor) { recorded |= tensor.requires_grad(); });
  if (op.signature.save < values.size()) values[op.signature.save] = recorded;
  const NodePointer node = recorded ? make_node(op, values) : NodePointer();
  try {
    const at::AutoDispatchBelowAutograd below;
    op.signature.forward.callBoxed(values);
  } catch (const std::exception&) {
    return false;
  }
  if (recorded) static_cast<OpNode&>(*node).finish(node, values);
  values.resize(op.signature.visible);
  return true;
}

PyObject* call(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto& bound = *static_cast<const BoundOp*>(PyCapsule_GetPointer(self, CAPSULE));
  const size_t expected = bound.op.signature.forward.schema().arguments().size();
  if (size_t(count) != expected || !unobserved() || at::impl::torch_function_mode_enabled())
    Py_RETURN_NONE;
  Values values;
  values.reserve(count);
  if (!count || !THPVariable_CheckExact(objects[0])) Py_RETURN_NONE;
  const Tensor& first = THPVariable_Unpack(objects[0]);
  if (!plain(first)) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < count; ++i) {
    auto value = from_python(objects[i], first);
    if (!value) Py_RETURN_NONE;
    values.push_back(*std::move(value));
  }
  if (!ready(bound, values)) Py_RETURN_NONE;
  bool done = false;
  {
    const py::gil_scoped_release no_gil;  // other Python threads run meanwhile
    done = run(bound.op, values);
  }
  if (!done) Py_RETURN_NONE;
  return tuple_of(values).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef call_method = {"op", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call)),
                           METH_FASTCALL, "The outputs, or None where the Python path must run."};

PyObject* define(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  const char *forward, *backward, *shapes;
  PyObject* callable;
  if (!PyArg_ParseTuple(arguments, "sssO", &forward, &backward, &shapes, &callable)) return nullptr;
  auto* bound = new BoundOp{{Signature(forward, backward), python_backward(callable)}, {}};
  bound->shapes = parse(shapes, bound->op.signature);
  const auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(bound, CAPSULE, nullptr));
  return capsule ? PyCFunction_New(&call_method, capsule.ptr()) : nullptr;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"define", define, METH_VARARGS,
     "define(forward, backward, shapes, python_backward) -> callable, see module.cpp"},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "fastflow._autograd",
                      nullptr,
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace
}  // namespace fastflow

PyMODINIT_FUNC PyInit__autograd() { return PyModule_Create(&fastflow::module); }
