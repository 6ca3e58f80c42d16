// Scalar mathematics of one planar step, shared by the CPU (vectors of rows) and CUDA (a row a
// thread). Letters and branches follow Rezende & Mohamed (2015), arXiv:1505.05770, rearranged so
// that no digit is lost:
//
//   z' = z + u_hat tanh(a),  a = w.z + b,  u_hat = u + alpha w,  alpha = (s1 - p) / n,
//   p = w.u,  n = |w|^2,  s = softplus(x) with x = p (paper) or p + c (centred),  s1 = s - 1 =
//   w.u_hat, L = log det = log(t^2 + q s),  t = tanh|a|,  q = sech^2 a:  a sum of positives.
//
// V is float, double or a vector of either. Include vector_math.h before this file to use vectors.
#pragma once

#include "../common/scalar_math.h"

namespace fastflow {

template <class T>
struct PlanarConstants;

// shift + shift_low = ln(e - 1): softplus(shift) = 1.
template <>
struct PlanarConstants<float> {
  static constexpr float shift = 0x1.152888p-1f;
  static constexpr float shift_low = 7.15823382416e-10f;
};
template <>
struct PlanarConstants<double> {
  static constexpr double shift = 0x1.15288806261ccp-1;
  static constexpr double shift_low = -1.8138570925507324931e-17;
};

// What a step needs to know of its parameters.
template <class V>
struct PlanarStep {
  V s1;      // w.u_hat = s - 1
  V s;       // softplus(x), without cancellation where it is small
  V x;       // argument of the softplus; 0 in the guard, for it only tells where s is tiny
  V root_s;  // sqrt(s) where x < -60, for s itself may underflow
  V ds;      // ds1/dp
  V dm;      // d(s1 - p)/dp = ds1/dp - 1, without cancellation; 0 in the guard
  V alpha;   // (s1 - p) / n; 0 in the guard
  V inv_n;   // 1 / n; 0 in the guard, so that what flows through alpha vanishes
};

// Below |w| = 2^-50 the step is that of w = 0: alpha = 0, s1 = max(p, -1/2).
template <class V>
FASTFLOW_HD PlanarStep<V> planar_step(V p, V n, bool centred) {
  using T = element_t<V>;
  using C = PlanarConstants<T>;
  const T e_minus_1 = T(1.718281828459045235360287471352662L);
  const T root_e_minus_1 = T(1.3108324944320861759067703611346874L);
  const T ratio = T(0.6321205588285576784044762298385391L);  // (e - 1) / e
  const T offset = centred ? C::shift : T(0);

  // One exponential and one logarithm serve three forms of s:
  //   x > 1.5:   s1 = (x - 1) + log1p(exp(-x))
  //   x < -0.5:  s  = log1p(exp(x))
  //   between:   s1 = log1p((e - 1)/e expm1(x - ln(e - 1))), which vanishes exactly where s1 does
  // The exponential is taken of what is exact, p: exp(p + ln(e - 1)) = (e - 1) exp(p).
  PlanarStep<V> step;
  step.x = p + offset;
  const auto large = step.x > T(1.5);
  const auto small = step.x < T(-0.5);
  const V from_root = centred ? p : (p - C::shift) - C::shift_low;
  V e, em;
  exp_expm1(select(large, -p, select(small, p, from_root)), e, em);
  const V middle_ex = e_minus_1 * e;
  V ex;  // exp(-|x|) outside, exp(x) in the middle
  if (centred)
    ex = select(large, (T(1) / e_minus_1) * e, middle_ex);
  else
    ex = select(large | small, e, middle_ex);
  const V l = log1p(select(large | small, ex, ratio * em));
  step.s1 = select(large, (p + (offset - T(1))) + l, select(small, l - T(1), l));
  step.s = select(small, l, T(1) + step.s1);
  V m = select(large, (offset - T(1)) + l, step.s1 - p);  // s1 - p
  step.root_s = V(T(0));
  const auto tiny = step.x < T(-60);
  if (any(tiny)) step.root_s = exp(T(0.5) * p) * (centred ? root_e_minus_1 : T(1));

  const V r = T(1) / (T(1) + ex);
  step.ds = select(large, r, ex * r);
  step.dm = -select(large, ex * r, r);

  const auto guard = n < T(0x1p-100);
  step.inv_n = T(1) / n;
  if (any(guard)) {
    const V s1 = max(p, V(T(-0.5)));
    step.s1 = select(guard, s1, step.s1);
    step.s = select(guard, T(1) + s1, step.s);
    step.x = select(guard, V(T(0)), step.x);
    step.ds = select(guard, select(p < T(-0.5), V(T(0)), V(T(1))), step.ds);
    step.dm = select(guard, V(T(0)), step.dm);
    step.inv_n = select(guard, V(T(0)), step.inv_n);
    m = select(guard, V(T(0)), m);
  }
  step.alpha = m * step.inv_n;
  return step;
}

// t = tanh|a| and q = sech^2 a, both to full relative accuracy.
template <class V>
struct PlanarTanh {
  V t;
  V q;
};

template <class V>
FASTFLOW_HD PlanarTanh<V> planar_tanh(V a) {
  using T = element_t<V>;
  V e, em;
  exp_expm1(T(-2) * abs(a), e, em);
  const V r = reciprocal(T(1) + e);
  const V t = -em * r;
  // q = (1 - t) (1 + t) with 1 - t = 2 e r. Where 1 - t^2 cancels nothing it has the smaller
  // rounding error.
  const V rest = T(2) * e * r;
  return {t, select(t < T(0.5), T(1) - t * t, rest * t + rest)};
}

// L = log(t^2 + q s).
template <class V>
FASTFLOW_HD V planar_ladj(const PlanarTanh<V>& tanh_a, const PlanarStep<V>& step) {
  using T = element_t<V>;
  const V y = tanh_a.q * step.s1;
  const auto plain = y > T(-0.5);
  V ladj = log1p_or_log(plain, y, tanh_a.t * tanh_a.t + tanh_a.q * step.s);
  // t^2 and s may both underflow: take the larger one out of the logarithm.
  const auto tiny = (step.x < T(-60)) & !plain;
  if (any(tiny)) {
    const V es = step.root_s;
    const auto t_wins = tanh_a.t > es;
    const V larger = select(t_wins, tanh_a.t, es);
    const V ratio = select(larger > T(0), select(t_wins, es, tanh_a.t) / larger, V(T(0)));
    const V rest = log1p_or_log(t_wins, tanh_a.q * ratio * ratio, tanh_a.q + ratio * ratio);
    const V lead = select(t_wins, T(2) * log(select(t_wins, tanh_a.t, V(T(1)))), step.x);
    ladj = select(tiny, lead + rest, ladj);
  }
  return ladj;
}

// The sum of L over the steps of a chain, for vectors: the determinants are multiplied and one
// logarithm is taken at the end. The product is kept in two parts, so that factors 1 + y close to 1
// lose no digit; where it leaves the range in which both parts are exact enough, logarithms are
// summed.
template <class V>
struct PlanarLadjSum {
  V logs = V(0);
  V product = V(1);
  V low = V(0);  // product + low is the product of the determinants

  FASTFLOW_HD void add(const PlanarTanh<V>& tanh_a, const PlanarStep<V>& step) {
    using T = element_t<V>;
    const V y = tanh_a.q * step.s1;
    const auto plain = y > T(-0.5);
    const V base = select(plain, product, V(T(0)));
    const V factor = select(plain, y, tanh_a.t * tanh_a.t + tanh_a.q * step.s);
    const V change = product * factor;
    const V next = base + change;
    const V rest = min(base, change) - (next - max(base, change));  // next + rest = base + change
    const V next_low = low * (select(plain, V(T(1)), V(T(0))) + factor) + rest;
    const auto in_range = (next >= T(0x1p-60)) & (next <= T(0x1p60));
    if (any(!in_range)) {
      logs += select(in_range, V(T(0)), log_sum(product, low) + planar_ladj(tanh_a, step));
      product = select(in_range, next, V(T(1)));
      low = select(in_range, next_low, V(T(0)));
    } else {
      product = next;
      low = next_low;
    }
  }
  FASTFLOW_HD V total() const { return logs + log_sum(product, low); }
};

// dL/da (with the sign of a), dL/dp and det of a step.
template <class V>
struct PlanarGrad {
  V dl_da;
  V dl_dp;
  V det;
};

template <class V>
FASTFLOW_HD PlanarGrad<V> planar_ladj_grad(V a, const PlanarTanh<V>& tanh_a,
                                           const PlanarStep<V>& step) {
  using T = element_t<V>;
  const V y = tanh_a.q * step.s1;
  const auto plain = y > T(-0.5);
  PlanarGrad<V> grad;
  grad.det = select(plain, T(1) + y, tanh_a.t * tanh_a.t + tanh_a.q * step.s);
  const V r = T(1) / grad.det;
  V t_over_det = tanh_a.t * r;
  grad.dl_dp = (tanh_a.q * step.ds) * r;
  const auto tiny = (step.x < T(-60)) & !plain;
  if (any(tiny)) {
    const V es = step.root_s;  // sqrt(ds1/dp) too
    const V t = max(tanh_a.t, V(Limits<T>::min_normal));
    const V rt = select(tanh_a.t > T(0), tanh_a.t / es, V(T(0)));
    t_over_det = select(
        tiny, select(tanh_a.t > T(0), T(1) / (t + tanh_a.q * es * (es / t)), V(T(0))), t_over_det);
    grad.dl_dp = select(tiny, tanh_a.q / (tanh_a.q + rt * rt), grad.dl_dp);
    grad.det = select(tiny, max(grad.det, V(Limits<T>::min_normal)), grad.det);
  }
  grad.dl_da = copysign(V(T(2)), -a) * (t_over_det * y);
  return grad;
}

// What a step hands back, given h = u_hat.g and g_ladj, the cotangent of the sum of L: the
// cotangents gamma of r = w.x + b and dp of p, the latter without what flows through alpha. With
// x' = x + u_hat t, t = tanh(a), or for the inverse -tanh(a).
template <class V>
struct PlanarPullback {
  V t;
  V gamma;
  V dp;
};

template <class V>
FASTFLOW_HD PlanarPullback<V> pull_back(V a, V h, V g_ladj, const PlanarStep<V>& step,
                                        bool inverse) {
  const auto tanh_a = planar_tanh(a);
  const auto grad = planar_ladj_grad(a, tanh_a, step);
  const V t = copysign(tanh_a.t, a);
  if (!inverse) return {t, tanh_a.q * h + g_ladj * grad.dl_da, g_ladj * grad.dl_dp};
  const V gamma = (g_ladj * grad.dl_da - tanh_a.q * h) / grad.det;
  return {-t, gamma, g_ladj * grad.dl_dp - step.ds * t * gamma};
}

// a cosh(a) - sinh(a) = a^3 (1/3 + a^2/30 + ...) for 0 <= a <= 1.
template <class V>
FASTFLOW_HD V planar_excess(V a) {
  using T = element_t<V>;
  const V square = a * a;
  V sum = T(2 * 9 / 121645100408832000.0);  // 2n / (2n + 1)!
  sum = sum * square + T(2 * 8 / 355687428096000.0);
  sum = sum * square + T(2 * 7 / 1307674368000.0);
  sum = sum * square + T(2 * 6 / 6227020800.0);
  sum = sum * square + T(2 * 5 / 39916800.0);
  sum = sum * square + T(2 * 4 / 362880.0);
  sum = sum * square + T(2 * 3 / 5040.0);
  sum = sum * square + T(2 * 2 / 120.0);
  sum = sum * square + T(2 * 1 / 6.0);
  return sum * square * a;
}

// Solves a + s1 tanh(a) = r for a. The left side is odd and increasing: solve for |r|.
//   s1 >= 0: concave on a > 0, Newton from below;  s1 < 0: convex, Newton from above.
// Either way the iterates move to one side only, so a step that does not (or a NaN) ends the
// search: rounding cannot make it cycle, and each lane stops on its own.
template <class V>
FASTFLOW_HD V planar_solve(V r, const PlanarStep<V>& step) {
  using T = element_t<V>;
  const V target = abs(r);
  const auto below = step.s1 >= T(0);
  const V m = abs(step.s1);
  const V quotient = target / step.s;
  V above = min(quotient, target + m);
  const V cube = T(4.2) * target / m;  // a - tanh(a) >= a^3 / 4.2 on [0, 1]
  const auto cubic = (cube <= T(1)) & !below;
  if (any(cubic)) {
    const V root = exp(log(cube) * T(1.0 / 3.0)) * T(1.000002);
    above = select(cubic, min(root, above), above);
  }
  V a = select(below, max(quotient, target - m), above);

  const int max_iterations = 100;
  const auto finite = target <= Limits<T>::max;
  auto active = finite;
  for (int i = 0; i < max_iterations && any(active); ++i) {
    V e, em;  // exp(-a), and less 1
    exp_expm1(-a, e, em);
    const V r1 = T(1) / (T(1) + e * e);
    const V t = -em * (T(2) + em) * r1;
    const V sech = T(2) * e * r1;
    const V det = t * t + sech * sech * step.s;
    // f = a + s1 t: near a = 0 with s1 near -1 it is what a - tanh(a) leaves, and s t
    V f = select(below, (a - target) + m * t, ((a - t) + step.s * t) - target);
    const auto flat = (step.s < T(0.5)) & (a < T(1));
    if (any(flat & active)) f = select(flat, (planar_excess(a) * sech + step.s * t) - target, f);
    const V newton = a - f / max(det, V(Limits<T>::min_normal));
    const V next = select(below, min(newton, target), max(newton, target));
    const auto moves = select(below, next - a, a - next) > T(0);
    a = select(active & moves, next, a);
    active = active & moves;
  }
  return copysign(select(finite, a, target), r);
}

}  // namespace fastflow
