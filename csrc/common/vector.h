// Vec<T>: one hardware vector of float or double, on the vector extensions of GCC and Clang. The
// width follows the target flags (AVX-512, AVX2, else 128 bits); intrinsics appear only where the
// extensions cannot say what is needed (masked memory, any).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "scalar_math.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastflow {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float Value __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  using IntScalar = int32_t;
};
template <>
struct VectorTypes<double> {
  typedef double Value __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  using IntScalar = int64_t;
};

// The result of a comparison: a bit a lane where the hardware has registers for that, else all bits
// of a lane set, or none.
template <class T>
struct Mask {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  using Bits = std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>;
#else
  using Bits = typename VectorTypes<T>::Int;
#endif
  Bits bits;

  friend FASTFLOW_HD Mask operator&(Mask a, Mask b) { return {Bits(a.bits & b.bits)}; }
  friend FASTFLOW_HD Mask operator|(Mask a, Mask b) { return {Bits(a.bits | b.bits)}; }
  friend FASTFLOW_HD Mask operator!(Mask a) { return {Bits(~a.bits)}; }
};

template <class T>
struct Vec {
  using Scalar = T;
  using Value = typename VectorTypes<T>::Value;
  using Int = typename VectorTypes<T>::Int;
  static constexpr int lanes = kVectorBytes / int(sizeof(T));

  Value value;

  Vec() = default;
  FASTFLOW_HD Vec(T x) : value(x - Value{}) {}  // x - 0 is x, the sign of zero included
  static FASTFLOW_HD Vec from(Value value) {
    Vec x;
    x.value = value;
    return x;
  }
  static FASTFLOW_HD Vec from_bits(Int bits) { return from((Value)bits); }
  FASTFLOW_HD Int bits() const { return (Int)value; }

  static FASTFLOW_HD Vec load(const T* p) {
    Vec x;
    std::memcpy(&x.value, p, sizeof(Value));
    return x;
  }
  FASTFLOW_HD void store(T* p) const { std::memcpy(p, &value, sizeof(Value)); }

  friend FASTFLOW_HD Vec operator+(Vec a, Vec b) { return from(a.value + b.value); }
  friend FASTFLOW_HD Vec operator-(Vec a, Vec b) { return from(a.value - b.value); }
  friend FASTFLOW_HD Vec operator*(Vec a, Vec b) { return from(a.value * b.value); }
  friend FASTFLOW_HD Vec operator/(Vec a, Vec b) { return from(a.value / b.value); }
  friend FASTFLOW_HD Vec operator-(Vec a) { return from(-a.value); }
  FASTFLOW_HD Vec& operator+=(Vec b) { return *this = *this + b; }
  FASTFLOW_HD Vec& operator-=(Vec b) { return *this = *this - b; }

#if defined(__AVX512F__) && defined(__AVX512DQ__)
  template <int Predicate>
  static FASTFLOW_HD Mask<T> compare(Vec a, Vec b) {
    if constexpr (sizeof(T) == 4)
      return {_mm512_cmp_ps_mask((__m512)a.value, (__m512)b.value, Predicate)};
    else
      return {_mm512_cmp_pd_mask((__m512d)a.value, (__m512d)b.value, Predicate)};
  }
  friend FASTFLOW_HD Mask<T> operator<(Vec a, Vec b) { return compare<_CMP_LT_OQ>(a, b); }
  friend FASTFLOW_HD Mask<T> operator<=(Vec a, Vec b) { return compare<_CMP_LE_OQ>(a, b); }
  friend FASTFLOW_HD Mask<T> operator>(Vec a, Vec b) { return compare<_CMP_GT_OQ>(a, b); }
  friend FASTFLOW_HD Mask<T> operator>=(Vec a, Vec b) { return compare<_CMP_GE_OQ>(a, b); }
#else
  friend FASTFLOW_HD Mask<T> operator<(Vec a, Vec b) { return {a.value < b.value}; }
  friend FASTFLOW_HD Mask<T> operator<=(Vec a, Vec b) { return {a.value <= b.value}; }
  friend FASTFLOW_HD Mask<T> operator>(Vec a, Vec b) { return {a.value > b.value}; }
  friend FASTFLOW_HD Mask<T> operator>=(Vec a, Vec b) { return {a.value >= b.value}; }
#endif
};

template <class T>
FASTFLOW_HD Vec<T> select(Mask<T> mask, Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  using Value = typename Vec<T>::Value;
  if constexpr (sizeof(T) == 4)
    return Vec<T>::from((Value)_mm512_mask_blend_ps(mask.bits, (__m512)b.value, (__m512)a.value));
  else
    return Vec<T>::from((Value)_mm512_mask_blend_pd(mask.bits, (__m512d)b.value, (__m512d)a.value));
#else
  return Vec<T>::from(mask.bits ? a.value : b.value);
#endif
}
template <class T>
FASTFLOW_HD Vec<T> min(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  using Value = typename Vec<T>::Value;
  if constexpr (sizeof(T) == 4)
    return Vec<T>::from((Value)_mm512_min_ps((__m512)a.value, (__m512)b.value));
  else
    return Vec<T>::from((Value)_mm512_min_pd((__m512d)a.value, (__m512d)b.value));
#else
  return select(a < b, a, b);
#endif
}
template <class T>
FASTFLOW_HD Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  using Value = typename Vec<T>::Value;
  if constexpr (sizeof(T) == 4)
    return Vec<T>::from((Value)_mm512_max_ps((__m512)a.value, (__m512)b.value));
  else
    return Vec<T>::from((Value)_mm512_max_pd((__m512d)a.value, (__m512d)b.value));
#else
  return select(a > b, a, b);
#endif
}

template <class T>
FASTFLOW_HD typename VectorTypes<T>::Int sign_bit() {
  return Vec<T>(T(-0.0)).bits();
}
template <class T>
FASTFLOW_HD Vec<T> abs(Vec<T> x) {
  return Vec<T>::from_bits(x.bits() & ~sign_bit<T>());
}
template <class T>
FASTFLOW_HD Vec<T> copysign(Vec<T> x, Vec<T> sign) {
  return Vec<T>::from_bits((x.bits() & ~sign_bit<T>()) | (sign.bits() & sign_bit<T>()));
}

template <class T>
FASTFLOW_HD bool any(Mask<T> mask) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return mask.bits != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask.bits) != 0;
#else
  uint64_t words[kVectorBytes / 8];
  std::memcpy(words, &mask.bits, sizeof words);
  uint64_t all = 0;
  for (uint64_t word : words) all |= word;
  return all != 0;
#endif
}

// All bits set in lanes 0 .. n-1.
template <class T, int... Lane>
FASTFLOW_HD Mask<T> first_lanes(int n, std::integer_sequence<int, Lane...>) {
  using Int = typename VectorTypes<T>::Int;
  return {Int{Lane...} < (typename VectorTypes<T>::IntScalar)n};
}
template <class T>
FASTFLOW_HD Mask<T> first_lanes(int n) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return {typename Mask<T>::Bits((1u << n) - 1)};
#else
  return first_lanes<T>(n, std::make_integer_sequence<int, Vec<T>::lanes>{});
#endif
}

// The first n lanes (0 <= n <= lanes) of memory; the other lanes are 0 and never touched.
template <class T>
FASTFLOW_HD Vec<T> load_partial(const T* p, int n) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  using Value = typename Vec<T>::Value;
  if constexpr (sizeof(T) == 4)
    return Vec<T>::from((Value)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  else
    return Vec<T>::from((Value)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
#elif defined(__AVX2__)
  using Value = typename Vec<T>::Value;
  if constexpr (sizeof(T) == 4)
    return Vec<T>::from((Value)_mm256_maskload_ps(p, (__m256i)first_lanes<T>(n).bits));
  else
    return Vec<T>::from((Value)_mm256_maskload_pd(p, (__m256i)first_lanes<T>(n).bits));
#else
  T lanes[Vec<T>::lanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return Vec<T>::load(lanes);
#endif
}
template <class T>
FASTFLOW_HD void store_partial(Vec<T> x, T* p, int n) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x.value);
  else
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)x.value);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    _mm256_maskstore_ps(p, (__m256i)first_lanes<T>(n).bits, (__m256)x.value);
  else
    _mm256_maskstore_pd(p, (__m256i)first_lanes<T>(n).bits, (__m256d)x.value);
#else
  T lanes[Vec<T>::lanes];
  x.store(lanes);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// Lanes Index... of the concatenation of a and b.
template <class T, int... Index>
FASTFLOW_HD Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, Index...>) {
#if defined(__clang__)
  return Vec<T>::from(__builtin_shufflevector(a.value, b.value, Index...));
#else
  return Vec<T>::from(__builtin_shuffle(a.value, b.value, typename Vec<T>::Int{Index...}));
#endif
}

// With bit = a power of 2: exchange(a, b) has the lanes of a whose index lacks `bit`, and between
// them the like lanes of b (Upper = false), or the lanes that have it of both (Upper = true).
template <int Bit, bool Upper, class T, int... Lane>
FASTFLOW_HD Vec<T> exchange(Vec<T> a, Vec<T> b, std::integer_sequence<int, Lane...>) {
  constexpr int lanes = Vec<T>::lanes;
  return shuffle(
      a, b,
      std::integer_sequence<int, (Upper ? (Lane & Bit ? Lane + lanes : Lane + Bit)
                                        : (Lane & Bit ? Lane - Bit + lanes : Lane))...>{});
}

template <int Bit = 1, class T>
FASTFLOW_HD void transpose(Vec<T> (&rows)[Vec<T>::lanes]) {
  constexpr int lanes = Vec<T>::lanes;
  if constexpr (Bit < lanes) {
    using Lanes = std::make_integer_sequence<int, lanes>;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & Bit) continue;
      const Vec<T> a = rows[i], b = rows[i + Bit];
      rows[i] = exchange<Bit, false>(a, b, Lanes{});
      rows[i + Bit] = exchange<Bit, true>(a, b, Lanes{});
    }
    transpose<2 * Bit>(rows);
  }
}

// Lane i of the result is the sum of the lanes of rows[i]; one order of summation for all i.
template <int Bit = 1, class T, int N>
FASTFLOW_HD Vec<T> sum_each(const Vec<T> (&rows)[N]) {
  static_assert(N * Bit == Vec<T>::lanes);
  if constexpr (N == 1) {
    return rows[0];
  } else {
    using Lanes = std::make_integer_sequence<int, Vec<T>::lanes>;
    Vec<T> half[N / 2];
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      const Vec<T> a = rows[2 * i], b = rows[2 * i + 1];
      half[i] = exchange<Bit, false>(a, b, Lanes{}) + exchange<Bit, true>(a, b, Lanes{});
    }
    return sum_each<2 * Bit>(half);
  }
}

template <class T>
FASTFLOW_HD T sum(Vec<T> x) {
  T lanes[Vec<T>::lanes];
  x.store(lanes);
  for (int n = Vec<T>::lanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

}  // namespace fastflow
