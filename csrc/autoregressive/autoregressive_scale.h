// The scale maps: from the raw output `a` to the scale s, l = log s and dl/da, on vectors.
#pragma once

#include "autoregressive_activation.h"

namespace fastflow {

// complement = 1 - s, kind `gate` only.
template <class T>
struct Scaled {
  Vec<T> l;
  Vec<T> s;
  Vec<T> complement;
  Vec<T> slope;  // dl/da
};

template <Scale Kind, class T>
FASTFLOW_HD Scaled<T> scale_map(Vec<T> a, T c0, T c1) {
  const Vec<T> one(T(1));
  Scaled<T> out{};
  if constexpr (Kind == Scale::softclip) {
    const Vec<T> r = T(1) / (T(1) + abs(a / c0));
    out.l = a * r;
    out.s = exp(out.l);
    out.slope = r * r;
  } else if constexpr (Kind == Scale::clamp) {
    out.l = select(a < c0, Vec<T>(c0), select(a > c1, Vec<T>(c1), a));
    out.s = exp(out.l);
    out.slope = one;
  } else {
    const Vec<T> v = a + c0;
    const auto sigma = sigmoid(v);
    if (Kind == Scale::softplus) {
      const Vec<T> plain = softplus(v, sigma.e);
      out.s = plain + c1;
      out.l = log(out.s);
      out.slope = sigma.s / out.s;
      // Without c1 the scale may underflow: log(log1p(e)) = log(e) - e/2 + ..., with e = e^v.
      const auto tiny = v < T(-20);
      if (c1 == T(0) && any(tiny)) {
        out.l = select(tiny, v - T(0.5) * sigma.e, out.l);
        out.slope = select(tiny, T(1) - T(0.5) * sigma.e, out.slope);
      }
    } else if (Kind == Scale::sigmoid && c1 != T(0)) {
      out.s = sigma.s + c1;
      out.l = log(out.s);
      out.slope = sigma.s * sigma.complement / out.s;
    } else {
      out.s = sigma.s;
      out.complement = sigma.complement;
      out.l = -softplus(-v, sigma.e);
      out.slope = sigma.complement;
    }
  }
  return out;
}

// f(std::integral_constant<Scale, kind>)
template <class F>
FASTFLOW_HD void with_scale(Scale kind, const F& f) {
  switch (kind) {
    case Scale::softclip:
      return f(std::integral_constant<Scale, Scale::softclip>{});
    case Scale::softplus:
      return f(std::integral_constant<Scale, Scale::softplus>{});
    case Scale::sigmoid:
      return f(std::integral_constant<Scale, Scale::sigmoid>{});
    case Scale::clamp:
      return f(std::integral_constant<Scale, Scale::clamp>{});
    case Scale::gate:
      return f(std::integral_constant<Scale, Scale::gate>{});
  }
}

}  // namespace fastflow
