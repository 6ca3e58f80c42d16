// Activations and scale maps on a single value, chosen at run time: they are few compared with the
// products between them.
#pragma once

#include "../common/scalar_math.h"
#include "autoregressive.h"

namespace fastflow {

// sigmoid(v), sigmoid(-v) and e = exp(-|v|), each to full relative accuracy.
template <class T>
struct ScalarSigmoid {
  T s;
  T complement;
  T e;
};
template <class T>
FASTFLOW_HD ScalarSigmoid<T> scalar_sigmoid(T v) {
  const T e = exp(-abs(v)), larger = T(1) / (T(1) + e), smaller = e * larger;
  return v > T(0) ? ScalarSigmoid<T>{larger, smaller, e} : ScalarSigmoid<T>{smaller, larger, e};
}

// log(1 + exp(v)), given e = exp(-|v|).
template <class T>
FASTFLOW_HD T scalar_softplus(T v, T e) {
  return (v <= T(0) ? T(0) : v) + log1p(e);
}

FASTFLOW_HD float normal_cdf(float v) { return 0.5f * ::erfcf(-0.707106781f * v); }
FASTFLOW_HD double normal_cdf(double v) { return 0.5 * ::erfc(-0.70710678118654752440 * v); }

template <class T>
FASTFLOW_HD T activation(Activation kind, T v) {
  T e, em;
  switch (kind) {
    case Activation::relu:
      return v <= T(0) ? T(0) : v;
    case Activation::tanh:
      exp_expm1(T(-2) * abs(v), e, em);
      return copysign(-em / (T(1) + e), v);
    case Activation::elu:
      exp_expm1(v > T(0) ? T(0) : v, e, em);
      return v <= T(0) ? em : v;
    case Activation::silu:
      return v * scalar_sigmoid(v).s;
    case Activation::gelu:
      return v * normal_cdf(v);
    case Activation::softplus:
      return scalar_softplus(v, exp(-abs(v)));
    default:
      return v <= T(0) ? T(0.01) * v : v;
  }
}

template <class T>
FASTFLOW_HD T activation_slope(Activation kind, T v) {
  switch (kind) {
    case Activation::relu:
      return v <= T(0) ? T(0) : T(1);
    case Activation::tanh: {
      const T e = exp(T(-2) * abs(v)), r = T(1) / (T(1) + e);
      return T(4) * e * r * r;
    }
    case Activation::elu:
      return v <= T(0) ? exp(v) : T(1);
    case Activation::silu: {
      const auto sigmoid = scalar_sigmoid(v);
      return sigmoid.s * (T(1) + v * sigmoid.complement);
    }
    case Activation::gelu:
      return normal_cdf(v) + v * exp(T(-0.5) * v * v) * T(0.3989422804014326779);
    case Activation::softplus:
      return scalar_sigmoid(v).s;
    default:
      return v <= T(0) ? T(0.01) : T(1);
  }
}

// complement = 1 - s, kind `gate` only; slope = dl/da.
template <class T>
struct LogScale {
  T l;
  T complement;
  T slope;
};

template <class T>
FASTFLOW_HD LogScale<T> log_scale(Scale kind, T a, T c0, T c1) {
  if (kind == Scale::softclip) {
    const T r = T(1) / (T(1) + abs(a / c0));
    return {a * r, T(0), r * r};
  }
  if (kind == Scale::clamp) return {a < c0 ? c0 : a > c1 ? c1 : a, T(0), T(1)};
  const T v = a + c0;
  const auto sigmoid = scalar_sigmoid(v);
  if (kind == Scale::softplus) {
    // Without c1 the scale may underflow: log(log1p(e)) = log(e) - e/2 + ..., with e = e^v.
    if (c1 == T(0) && v < T(-20)) return {v - T(0.5) * sigmoid.e, T(0), T(1) - T(0.5) * sigmoid.e};
    const T s = scalar_softplus(v, sigmoid.e) + c1;
    return {log(s), T(0), sigmoid.s / s};
  }
  if (kind == Scale::sigmoid && c1 != T(0)) {
    const T s = sigmoid.s + c1;
    return {log(s), T(0), sigmoid.s * sigmoid.complement / s};
  }
  return {-scalar_softplus(-v, sigmoid.e), sigmoid.complement, sigmoid.complement};
}

}  // namespace fastflow
