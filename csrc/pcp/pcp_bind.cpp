// Registers pcp with PyTorch: from stable-ABI tensors to PcpArgs and back. It has CPU kernels only,
// so that the CUDA library gets nothing of this file.
#ifndef FASTFLOW_CUDA

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../common/bind.h"
#include "pcp.h"

namespace fastflow {
namespace {

using Tensors = std::vector<Tensor>;

void check(bool good, const char* name, const char* what) {
  STD_TORCH_CHECK(good, "pcp: ", name, what);
}

void check_like(const Tensor& tensor, const char* name, const Tensor& first, Shape shape) {
  fastflow::check_like("pcp", tensor, name, first, shape);
}

// A call as the kernels see it; the tensors it points to outlive it.
struct Call {
  PcpArgs args{};
  std::vector<int64_t> widths;
  std::vector<PcpTensor> net;

  Call(const Tensor& point, const Tensors& tensors, int64_t layers) {
    const auto dtype = point.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, "the point",
          " must be float32 or float64");
    check(point.dim() == 2 && point.size(1) >= 1, "the point", " must have shape (B, D), D >= 1");
    args.batch = point.size(0);
    args.features = point.size(1);
    args.layers = layers;
    args.is_double = dtype == ScalarType::Double;
    check_like(point, "the point", point, {args.batch, args.features});
    const int64_t count = int64_t(tensors.size());
    check(layers >= 1 && layers <= count, "layers", " must be at least 1");
    args.conditional = count > 3 * layers + 2;
    check(count == args.tensors(), "net", " must hold 3 K + 2 or 5 K + 1 tensors for K layers");
    for (int64_t k = 0; k < layers; ++k) {
      const Tensor& input = tensors[size_t(k)];
      check(input.dim() == 2 && input.size(0) >= 1, "an input matrix", " must have shape (H, D)");
      widths.push_back(input.size(0));
    }
    args.widths = widths.data();
    net.resize(tensors.size());
    args.net = net.data();
    for (int64_t k = 0; k < layers; ++k) {
      const int64_t units = widths[size_t(k)], below = k ? widths[size_t(k - 1)] : 0;
      set_matrix(args.input(k), tensors, {units, args.features}, point);
      if (k) set_matrix(args.weight(k), tensors, {units, below}, point);
      set_term(args.offset(k), tensors, units, point);
      if (!args.conditional) continue;
      if (k) set_term(args.gate(k), tensors, below, point);
      set_term(args.scale(k), tensors, args.features, point);
    }
    set_term(args.slope(), tensors, widths.back(), point);
    set_term(args.shift(), tensors, args.features, point);
    set_term(args.curvature(), tensors, args.features, point);
  }

  // New gradients of all tensors, which the kernels write; empty ones if none are wanted.
  Tensors make_gradients(const Tensors& tensors, const Tensor& like) {
    Tensors gradients;
    for (size_t i = 0; i < net.size(); ++i) {
      const Tensor& tensor = tensors[i];
      if (!args.param_grads)
        gradients.push_back(empty({0}, like));
      else if (tensor.dim() == 1)
        gradients.push_back(empty({tensor.size(0)}, like));
      else
        gradients.push_back(empty({tensor.size(0), tensor.size(1)}, like));
      net[i].grad = gradients.back().data_ptr();
    }
    return gradients;
  }

 private:
  size_t index(const PcpTensor& entry) const { return size_t(&entry - net.data()); }
  void set_matrix(const PcpTensor& entry, const Tensors& tensors, Shape shape,
                  const Tensor& point) {
    const Tensor& tensor = tensors[index(entry)];
    check_like(tensor, "a matrix", point, shape);
    net[index(entry)] = {tensor.data_ptr(), shape.begin()[0] * shape.begin()[1], 0, true, nullptr};
  }
  void set_term(const PcpTensor& entry, const Tensors& tensors, int64_t n, const Tensor& point) {
    const Tensor& tensor = tensors[index(entry)];
    const int64_t dims = tensor.dim();
    check(tensor.scalar_type() == point.scalar_type() && tensor.is_cpu(), "a term",
          " must have the dtype and the device of the point");
    check(dims == 1 || dims == 2, "a term", " must have shape (n,) or (B, n)");
    check(tensor.size(dims - 1) == n && (dims == 1 || tensor.size(0) == args.batch), "a term",
          " has the wrong shape");
    check(n == 1 || tensor.stride(dims - 1) == 1, "a term", " must have contiguous rows");
    const int64_t stride = dims == 1 ? 0 : tensor.stride(0);
    net[index(entry)] = {tensor.data_ptr(), n, stride, dims == 1, nullptr};
  }
};

std::tuple<Tensor, Tensor, Tensors> apply(const Tensor& point, const Tensors& net, int64_t layers,
                                          bool inverse) {
  Call call(point, net, layers);
  PcpArgs& args = call.args;
  Tensor out = empty({args.batch, args.features}, point), ladj = empty({args.batch}, point);
  args.inverse = inverse;
  args.in = point.data_ptr();
  args.out = out.data_ptr();
  args.ladj = ladj.data_ptr();
  inverse ? pcp_inverse_cpu(args) : pcp_forward_cpu(args);
  return {std::move(out), std::move(ladj), Tensors{}};
}

std::tuple<Tensor, Tensors> apply_backward(const Tensor& d_out, const Tensor& dladj,
                                           const Tensor& x, const Tensors& net, int64_t layers,
                                           bool param_grads, bool inverse) {
  Call call(x, net, layers);
  PcpArgs& args = call.args;
  check_like(d_out, "the cotangent of the output", x, {args.batch, args.features});
  check_like(dladj, "dladj", x, {args.batch});
  args.inverse = inverse;
  args.param_grads = param_grads;
  args.x = x.data_ptr();
  args.d_out = d_out.data_ptr();
  args.dladj = dladj.data_ptr();
  Tensor d_in = empty({args.batch, args.features}, x);
  args.d_in = d_in.data_ptr();
  Tensors dnet = call.make_gradients(net, x);
  pcp_backward_cpu(args);
  return {std::move(d_in), std::move(dnet)};
}

std::tuple<Tensor, Tensor, Tensors> pcp_forward(Tensor x, Tensors net, int64_t layers, bool) {
  return apply(x, net, layers, false);
}

std::tuple<Tensor, Tensor, Tensors> pcp_inverse(Tensor y, Tensors net, int64_t layers, bool) {
  return apply(y, net, layers, true);
}

std::tuple<Tensor, Tensors> pcp_backward(Tensor dy, Tensor dladj, Tensor x, Tensors, Tensors net,
                                         int64_t layers, bool param_grads) {
  return apply_backward(dy, dladj, x, net, layers, param_grads, false);
}

std::tuple<Tensor, Tensors> pcp_inverse_backward(Tensor dx, Tensor dladj, Tensor x, Tensors,
                                                 Tensors net, int64_t layers, bool param_grads) {
  return apply_backward(dx, dladj, x, net, layers, param_grads, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastflow, CPU, m) {
  m.impl("pcp_forward", TORCH_BOX(&pcp_forward));
  m.impl("pcp_backward", TORCH_BOX(&pcp_backward));
  m.impl("pcp_inverse", TORCH_BOX(&pcp_inverse));
  m.impl("pcp_inverse_backward", TORCH_BOX(&pcp_inverse_backward));
}

}  // namespace fastflow

#endif
