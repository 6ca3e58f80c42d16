// The activations of masked networks with their slopes, on vectors, within a few ulp. NaN stays
// NaN.
#pragma once

#include "../common/vector_math.h"
#include "autoregressive.h"

namespace fastflow {

template <class T>
struct Activated {
  Vec<T> value;
  Vec<T> slope;
};

// sigmoid(v), sigmoid(-v) and e = exp(-|v|), each to full relative accuracy.
template <class T>
struct Sigmoid {
  Vec<T> s;
  Vec<T> complement;
  Vec<T> e;
};
template <class T>
FASTFLOW_HD Sigmoid<T> sigmoid(Vec<T> v) {
  const Vec<T> e = exp(-abs(v));
  const Vec<T> larger = reciprocal(T(1) + e), smaller = e * larger;
  const auto positive = v > T(0);
  return {select(positive, larger, smaller), select(positive, smaller, larger), e};
}

// log(1 + exp(v)), given e = exp(-|v|).
template <class T>
FASTFLOW_HD Vec<T> softplus(Vec<T> v, Vec<T> e) {
  return select(v <= T(0), Vec<T>(T(0)), v) + log1p(e);
}

template <class T>
FASTFLOW_HD Activated<T> tanh_with_slope(Vec<T> v) {
  Vec<T> e, em;
  exp_expm1(T(-2) * abs(v), e, em);
  const Vec<T> r = reciprocal(T(1) + e);
  const Vec<T> t = -em * r;
  // 1 - t^2 has the smaller rounding error where it cancels nothing.
  return {copysign(t, v), select(t < T(0.5), T(1) - t * t, (T(4) * e) * r * r)};
}

// With u = (z - 4) / (z + 4): (1 + 2 z) exp(z^2 / 2) Phi(-z), Chebyshev, relative error 2^-30 on
// [0, 15] and 2^-58 on [0, 39].
template <class T>
struct NormalTable;
template <>
struct NormalTable<float> {
  static constexpr float zero = 15.0f;  // Phi(-zero) is 0
  static constexpr float split = 4097.0f;
  static constexpr float poly[] = {
      0.8496958017349243f,     -0.02300923317670822f,    -0.09638006240129471f,
      0.12890812754631042f,    -0.09525889903306961f,    0.044365294277668f,
      -0.010523565113544464f,  -0.0012222669320181012f,  0.0016080490313470364f,
      -9.348623279947788e-05f, -0.00022299052216112614f, -3.0136812711134553e-05f};
};
template <>
struct NormalTable<double> {
  static constexpr double zero = 39.0;
  static constexpr double split = 134217729.0;
  static constexpr double poly[] = {
      0.8496957717177205,      -0.023009233104596044,   -0.0963799858904141,
      0.12890813544482121,     -0.09526047896240457,    0.04436429044206446,
      -0.010512319259009438,   -0.001210060057523649,   0.001576978499456371,
      -0.00014330552267555376, -0.00020435484186225345, 3.786802108828562e-05,
      3.155777317638653e-05,   -6.033056808438122e-06,  -5.88834198743178e-06,
      5.98213303574763e-07,    1.1992458058764546e-06,  6.344473757177083e-08,
      -2.3124761900032545e-07, -5.961674211164592e-08,  3.344258735772406e-08,
      1.9154625401930754e-08,  -1.1141473100398423e-09, -2.9639969954019635e-09,
      -6.230045947917525e-10};
};

// The normal distribution function Phi(v) and density phi(v).
template <class T>
FASTFLOW_HD void normal(Vec<T> v, Vec<T>& cdf, Vec<T>& density) {
  using N = NormalTable<T>;
  Vec<T> z = abs(v);
  z = select(z > N::zero, Vec<T>(N::zero), z);  // NaN stays
  // square + rest = z^2 exactly: the rounding of z^2 alone costs the exponential z^2 ulp.
  const Vec<T> big = z * N::split;
  const Vec<T> high = big - (big - z), low = z - high;
  const Vec<T> square = z * z;
  const Vec<T> rest = ((high * high - square) + T(2) * high * low) + low * low;
  Vec<T> gauss = exp(T(-0.5) * square);
  gauss = gauss - gauss * (T(0.5) * rest);
  const Vec<T> u = (z - T(4)) / (z + T(4));
  const Vec<T> tail = gauss * polynomial(N::poly, u) / (T(1) + T(2) * z);
  cdf = select(v > T(0), T(1) - tail, tail);
  density = gauss * T(0.3989422804014326779);
}

template <Activation Kind, class T>
FASTFLOW_HD Activated<T> activate_with_slope(Vec<T> v) {
  const Vec<T> zero(T(0)), one(T(1));
  if constexpr (Kind == Activation::relu) {
    const auto dead = v <= T(0);
    return {select(dead, zero, v), select(dead, zero, one)};
  } else if constexpr (Kind == Activation::leaky_relu) {
    const auto low = v <= T(0);
    return {select(low, T(0.01) * v, v), select(low, Vec<T>(T(0.01)), one)};
  } else if constexpr (Kind == Activation::tanh) {
    return tanh_with_slope(v);
  } else if constexpr (Kind == Activation::elu) {
    Vec<T> e, em;
    exp_expm1(select(v > T(0), zero, v), e, em);
    const auto low = v <= T(0);
    return {select(low, em, v), select(low, e, one)};
  } else if constexpr (Kind == Activation::silu) {
    const auto s = sigmoid(v);
    return {v * s.s, s.s * (T(1) + v * s.complement)};
  } else if constexpr (Kind == Activation::gelu) {
    Vec<T> cdf, density;
    normal(v, cdf, density);
    return {v * cdf, cdf + v * density};
  } else {
    const auto s = sigmoid(v);
    return {softplus(v, s.e), s.s};
  }
}
template <Activation Kind, class T>
FASTFLOW_HD Vec<T> activate(Vec<T> v) {
  return activate_with_slope<Kind>(v).value;
}

// f(std::integral_constant<Activation, kind>)
template <class F>
FASTFLOW_HD void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::tanh:
      return f(std::integral_constant<Activation, Activation::tanh>{});
    case Activation::elu:
      return f(std::integral_constant<Activation, Activation::elu>{});
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::softplus:
      return f(std::integral_constant<Activation, Activation::softplus>{});
    case Activation::leaky_relu:
      return f(std::integral_constant<Activation, Activation::leaky_relu>{});
  }
}

}  // namespace fastflow
