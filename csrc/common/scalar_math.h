// The vocabulary of the shared math for plain float and double, on the host and on the device.
//
// Formulas are templates over a value type V that is float, double or a CPU vector (vector.h), and
// use only the names below: element_t, select, any, abs, copysign, min, max, exp, log, log1p,
// log1p_or_log, exp_expm1. On a scalar `any` is the identity, so `if (any(mask))` is a plain
// branch.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fastflow {

// The scalar type inside a value type: element_t<float> = float, element_t<Vec<float>> = float.
template <class V>
struct Element {
  using type = typename V::Scalar;
};
template <>
struct Element<float> {
  using type = float;
};
template <>
struct Element<double> {
  using type = double;
};
template <class V>
using element_t = typename Element<V>::type;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float max = 0x1.fffffep+127f;
  static constexpr float min_normal = 0x1p-126f;
};
template <>
struct Limits<double> {
  static constexpr double max = 0x1.fffffffffffffp+1023;
  static constexpr double min_normal = 0x1p-1022;
};

FASTFLOW_HD bool any(bool mask) { return mask; }
FASTFLOW_HD float select(bool mask, float a, float b) { return mask ? a : b; }
FASTFLOW_HD double select(bool mask, double a, double b) { return mask ? a : b; }

FASTFLOW_HD float abs(float x) { return ::fabsf(x); }
FASTFLOW_HD double abs(double x) { return ::fabs(x); }
FASTFLOW_HD float copysign(float x, float sign) { return ::copysignf(x, sign); }
FASTFLOW_HD double copysign(double x, double sign) { return ::copysign(x, sign); }

// (a < b) ? a : b and (a > b) ? a : b: the second argument wins when either is NaN.
FASTFLOW_HD float min(float a, float b) { return a < b ? a : b; }
FASTFLOW_HD double min(double a, double b) { return a < b ? a : b; }
FASTFLOW_HD float max(float a, float b) { return a > b ? a : b; }
FASTFLOW_HD double max(double a, double b) { return a > b ? a : b; }

FASTFLOW_HD float exp(float x) { return ::expf(x); }
FASTFLOW_HD double exp(double x) { return ::exp(x); }
FASTFLOW_HD float log(float x) { return ::logf(x); }
FASTFLOW_HD double log(double x) { return ::log(x); }
FASTFLOW_HD float log1p(float x) { return ::log1pf(x); }
FASTFLOW_HD double log1p(double x) { return ::log1p(x); }

// 1 / x for x in [1, 2], within an ulp; float vectors need no division.
FASTFLOW_HD float reciprocal(float x) { return 1.0f / x; }
FASTFLOW_HD double reciprocal(double x) { return 1.0 / x; }

// e = exp(x), em = exp(x) - 1, each without cancellation; vectors share the range reduction.
FASTFLOW_HD void exp_expm1(float x, float& e, float& em) {
  e = ::expf(x);
  em = ::expm1f(x);
}
FASTFLOW_HD void exp_expm1(double x, double& e, double& em) {
  e = ::exp(x);
  em = ::expm1(x);
}

// log1p(y) where mask, log(x) elsewhere; vectors need a single logarithm for both.
FASTFLOW_HD float log1p_or_log(bool mask, float y, float x) { return mask ? log1p(y) : log(x); }
FASTFLOW_HD double log1p_or_log(bool mask, double y, double x) { return mask ? log1p(y) : log(x); }

}  // namespace fastflow
