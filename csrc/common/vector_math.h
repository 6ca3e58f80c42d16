// exp, expm1, log, log1p for Vec<float> and Vec<double>, within about 1 ulp. Compilers vectorise
// the library's functions only under -ffast-math, which a shared library must not be built with.
#pragma once

#include "vector.h"

namespace fastflow {

// Format and polynomials of a type. ln2_high has enough trailing zeros that k * ln2_high is exact.
template <class T>
struct MathTable;

template <>
struct MathTable<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr int bias = 127;
  static constexpr float round_magic = 0x1.8p23f;  // x + magic - magic rounds x to an integer
  static constexpr float log2e = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.63p-1f;
  static constexpr float ln2_low = -0x1.bd0106p-13f;
  static constexpr float exp_min = -105.0f;  // exp is 0 below
  static constexpr float sqrt_half = 0x1.6a09e6p-1f;
  // (e^r - 1 - r) / r^2 for |r| <= ln(2)/2: e^r - 1 within 2^-26 of its first term
  static constexpr float exp_poly[] = {0.5f, 0.1666654348373413f, 0.04166628047823906f,
                                       0.00836661085486412f, 0.0013946497347205877f};
  // (log(1 + f) - f + f^2/2) / f^3, minimax on [sqrt(1/2) - 1, sqrt(2) - 1]
  static constexpr float log_poly[] = {
      0.33333316445350647f, -0.25000810623168945f, 0.2000228613615036f,  -0.16624557971954346f,
      0.141811802983284f,   -0.1312870979309082f,  0.12881726026535034f, -0.07859842479228973f};
};

template <>
struct MathTable<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr int bias = 1023;
  static constexpr double round_magic = 0x1.8p52;
  static constexpr double log2e = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42feep-1;
  static constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double exp_min = -746.0;
  static constexpr double sqrt_half = 0x1.6a09e667f3bcdp-1;
  static constexpr double exp_poly[] = {0.5,
                                        0.16666666666666677,
                                        0.04166666666666669,
                                        0.008333333333320744,
                                        0.0013888888888868676,
                                        0.0001984126988869962,
                                        2.4801587359320542e-05,
                                        2.7557241334516154e-06,
                                        2.7557242693891483e-07,
                                        2.5110125718382987e-08,
                                        2.0924677344548527e-09};
  // fdlibm: log(1 + f) = f - f^2/2 + s (f^2/2 + R), s = f / (2 + f), R = z * poly(z), z = s^2
  static constexpr double log_poly[] = {
      0.6666666666666735130, 0.3999999999940941908, 0.2857142874366239149, 0.2222219843214978396,
      0.1818357216161805012, 0.1531383769920937332, 0.1479819860511658591};
};

// coefficients[0] + coefficients[1] x + ...
template <class T, int N>
FASTFLOW_HD Vec<T> polynomial(const T (&coefficients)[N], Vec<T> x) {
  Vec<T> sum(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// 2^k for integral k, gradual underflow included.
template <class T>
FASTFLOW_HD Vec<T> power_of_two(Vec<T> k) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  using Value = typename Vec<T>::Value;
  const auto one = Vec<T>(T(1)).value;
  if constexpr (sizeof(T) == 4)
    return Vec<T>::from((Value)_mm512_maskz_scalef_ps(__mmask16(-1), (__m512)one, (__m512)k.value));
  else
    return Vec<T>::from(
        (Value)_mm512_maskz_scalef_pd(__mmask8(-1), (__m512d)one, (__m512d)k.value));
#else
  using M = MathTable<T>;
  const auto n = (k + M::round_magic).bits() - Vec<T>(M::round_magic).bits();
  const auto half = n >> 1;
  const auto first = Vec<T>::from_bits((half + M::bias) << M::mantissa_bits);
  const auto second = Vec<T>::from_bits((n - half + M::bias) << M::mantissa_bits);
  return first * second;
#endif
}

// 1 / x for x in [1, 2], within an ulp: a Newton step from 14 bits takes a third of the cycles of a
// division.
template <class T>
FASTFLOW_HD Vec<T> reciprocal(Vec<T> x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  if constexpr (sizeof(T) == 4) {
    using Value = typename Vec<T>::Value;
    const auto r = Vec<T>::from((Value)_mm512_maskz_rcp14_ps(__mmask16(-1), (__m512)x.value));
    return r + r * (T(1) - x * r);
  }
#endif
  return T(1) / x;
}

// e = exp(x), em = exp(x) - 1, for x <= 88: the formulas here take no exponential of more.
template <class T>
FASTFLOW_HD void exp_expm1(Vec<T> x, Vec<T>& e, Vec<T>& em) {
  using M = MathTable<T>;
  x = max(Vec<T>(M::exp_min), x);  // NaN stays
  const Vec<T> k = (x * M::log2e + M::round_magic) - M::round_magic;
  const Vec<T> r = (x - k * M::ln2_high) - k * M::ln2_low;
  const Vec<T> p = r + (r * r) * polynomial(M::exp_poly, r);  // exp(r) - 1
  const Vec<T> s = power_of_two(k);
  e = s * p + s;
  em = s * p + (s - T(1));
}
template <class T>
FASTFLOW_HD Vec<T> exp(Vec<T> x) {
  Vec<T> e, em;
  exp_expm1(x, e, em);
  return e;
}

// log(1 + f), |f| small, plus k ln 2.
FASTFLOW_HD Vec<float> log_reduced(Vec<float> f, Vec<float> k) {
  using M = MathTable<float>;
  const Vec<float> square = f * f;
  Vec<float> tail = f * square * polynomial(M::log_poly, f) + k * M::ln2_low;
  tail = tail - 0.5f * square;
  return k * M::ln2_high + (f + tail);
}
FASTFLOW_HD Vec<double> log_reduced(Vec<double> f, Vec<double> k) {
  using M = MathTable<double>;
  const Vec<double> s = f / (2.0 + f);
  const Vec<double> z = s * s;
  const Vec<double> half_square = 0.5 * f * f;
  const Vec<double> r = z * polynomial(M::log_poly, z);
  return k * M::ln2_high - ((half_square - (s * (half_square + r) + k * M::ln2_low)) - f);
}

// log(x + low) for |low| below an ulp of x >= 0; the sum need not be representable.
template <class T>
FASTFLOW_HD Vec<T> log_sum(Vec<T> x, Vec<T> low) {
  using M = MathTable<T>;
  Vec<T> k0(T(0));
  Vec<T> y = x;
  const auto subnormal = x < Limits<T>::min_normal;
  if (any(subnormal)) {
    const T up = T(uint64_t(1) << (M::mantissa_bits + 1));
    y = select(subnormal, x * up, x);
    low = select(subnormal, low * up, low);
    k0 = select(subnormal, Vec<T>(T(-(M::mantissa_bits + 1))), k0);
  }
  // y = 2^k m with m in [sqrt(1/2), sqrt(2))
  const auto root = Vec<T>(M::sqrt_half).bits();
  const auto n = (y.bits() - root) >> M::mantissa_bits;
  const auto m = Vec<T>::from_bits(y.bits() - (n << M::mantissa_bits));
  const auto inverse_power = Vec<T>::from_bits((M::bias - n) << M::mantissa_bits);
  const auto magic = Vec<T>(M::round_magic);
  const Vec<T> k = Vec<T>::from_bits(n + magic.bits()) - magic;
  Vec<T> result = log_reduced((m - T(1)) + low * inverse_power, k + k0);
  result = select(x <= Limits<T>::max, result, x);  // inf and NaN
  if (any(subnormal)) {
    result = select(x <= T(0), Vec<T>(T(-__builtin_inf())), result);
    result = select(x < T(0), Vec<T>(T(__builtin_nan(""))), result);
  }
  return result;
}
template <class T>
FASTFLOW_HD Vec<T> log(Vec<T> x) {
  return log_sum(x, Vec<T>(T(0)));
}

// log1p(y) where mask, log(x) elsewhere.
template <class T>
FASTFLOW_HD Vec<T> log1p_or_log(Mask<T> mask, Vec<T> y, Vec<T> x) {
  const Vec<T> u = T(1) + y;
  const Vec<T> v = u - T(1);
  const Vec<T> low = (T(1) - (u - v)) + (y - v);  // u + low = 1 + y exactly
  return log_sum(select(mask, u, x), select(mask, low, Vec<T>(T(0))));
}
template <class T>
FASTFLOW_HD Vec<T> log1p(Vec<T> y) {
  const Vec<T> u = T(1) + y;
  const Vec<T> v = u - T(1);
  return log_sum(u, (T(1) - (u - v)) + (y - v));
}

}  // namespace fastflow
