// The Python module of the autograd node: define(...) makes a callable of an op, which runs it in
// plain eager mode, derivative included, and answers None wherever the Python path must take over.
//
// This is the one library that uses neither PyTorch's stable ABI nor an ABI of many Pythons; it
// serves only the torch and the Python that it was compiled for, and the package does without it.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
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

bool fits(const Shapes& shapes, const Values& arguments) {
  std::array<int64_t, 256> sizes{};
  std::optional<c10::ScalarType> dtype;
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (shapes[i] == "*") continue;
    if (!arguments[i].isTensor()) return false;
    const Tensor& tensor = arguments[i].toTensor();
    const auto found = tensor.sizes();
    if (!dtype) dtype = tensor.scalar_type();
    if (*dtype != at::kFloat && *dtype != at::kDouble) return false;
    if (tensor.scalar_type() != *dtype || !tensor.is_contiguous()) return false;
    if (found.size() != shapes[i].size()) return false;
    for (size_t j = 0; j < found.size(); ++j) {
      int64_t& size = sizes[static_cast<unsigned char>(shapes[i][j])];
      if (size == 0) size = found[j];
      if (found[j] < 1 || found[j] != size) return false;
    }
  }
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
// tensors.
std::optional<IValue> from_python(PyObject* object) {
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
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(object, i);
    if (!THPVariable_CheckExact(item)) return std::nullopt;
    list.push_back(THPVariable_Unpack(item));
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

// Runs the op; leaves its outputs, those that a caller sees, in `values`.
void run(const Op& op, Values& values) {
  bool recorded = false;
  if (at::GradMode::is_enabled())
    for (const IValue& value : values)
      each_tensor(value, [&](const Tensor& tensor) { recorded |= tensor.requires_grad(); });
  const NodePointer node = recorded ? make_node(op, values) : NodePointer();
  {
    const at::AutoDispatchBelowAutograd below;
    op.signature.forward.callBoxed(values);
  }
  if (recorded) static_cast<OpNode&>(*node).finish(node, values);
  values.resize(op.signature.visible);
}

PyObject* call(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto& bound = *static_cast<const BoundOp*>(PyCapsule_GetPointer(self, CAPSULE));
  const size_t expected = bound.op.signature.forward.schema().arguments().size();
  if (size_t(count) != expected || !unobserved() || at::impl::torch_function_mode_enabled())
    Py_RETURN_NONE;
  Values values;
  values.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    auto value = from_python(objects[i]);
    if (!value) Py_RETURN_NONE;
    values.push_back(*std::move(value));
  }
  if (!ready(bound, values)) Py_RETURN_NONE;
  {
    const py::gil_scoped_release no_gil;  // other Python threads run meanwhile
    run(bound.op, values);
  }
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
