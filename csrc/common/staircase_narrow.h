// The products of staircase.h for a few rows: there the lanes of vectors are rows, and most of them
// would be idle. Here they are units. Squares of weights are turned in registers (those of the
// transpose lie as they are needed), so that every unit still sums its own terms in ascending
// order, in the same pieces: a row gets the same bits from either.
#pragma once

#include "staircase.h"

namespace fastflow {

// Up to so many rows the weights are turned; from there on whole vectors of rows are taken.
inline constexpr int kNarrowRows = 4;

// a b + c, rounded once where the loops of staircase.h round once. Said outright, since compilers
// do not fuse a product that they have moved out of a branch.
template <class T>
FASTFLOW_HD Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  using Value = typename Vec<T>::Value;
  if constexpr (sizeof(T) == 4)
    return Vec<T>::from((Value)_mm512_fmadd_ps((__m512)a.value, (__m512)b.value, (__m512)c.value));
  else
    return Vec<T>::from(
        (Value)_mm512_fmadd_pd((__m512d)a.value, (__m512d)b.value, (__m512d)c.value));
#elif defined(__AVX2__) && defined(__FMA__)
  using Value = typename Vec<T>::Value;
  if constexpr (sizeof(T) == 4)
    return Vec<T>::from((Value)_mm256_fmadd_ps((__m256)a.value, (__m256)b.value, (__m256)c.value));
  else
    return Vec<T>::from(
        (Value)_mm256_fmadd_pd((__m256d)a.value, (__m256d)b.value, (__m256d)c.value));
#else
  return a * b + c;
#endif
}

// sum[r] += w(j, k) a[k * rows + r] for the steps k in [first, last) and the units j in the lanes;
// begin and end (<= last) are those of the units, and bound what each of them sees.
template <int Rows, class T>
inline void narrow_steps(const T* const (&w)[Vec<T>::lanes], const T* a, int64_t rows,
                         int64_t first, int64_t last, Vec<T> begin, Vec<T> end, int64_t all_begin,
                         int64_t all_end, Vec<T> (&sum)[Rows]) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t k = first; k < last; k += lanes) {
    const int64_t n = std::min<int64_t>(lanes, last - k);
    Vec<T> square[lanes];
#pragma GCC unroll 16
    for (int j = 0; j < lanes; ++j) square[j] = load_up_to(w[j] + k, n);
    transpose(square);
    const T* x = a + k * rows;
    if (k >= all_begin && k + lanes <= all_end) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          sum[r] = multiply_add(square[i], Vec<T>(x[i * rows + r]), sum[r]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const Mask<T> seen = (begin <= Vec<T>(T(k + i))) & (end > Vec<T>(T(k + i)));
        const T* xi = x + std::min<int64_t>(i, n - 1) * rows;
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          sum[r] = select(seen, multiply_add(square[i], Vec<T>(xi[r]), sum[r]), sum[r]);
      }
    }
  }
}

// stair_product for the first `Rows` rows of the tile; w.step_stride is 1.
template <int Rows, class T, class RangeOf>
void narrow_product(Strided<T> w, const T* a, T* c, int64_t rows, int64_t count,
                    const RangeOf& range) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t j0 = 0; j0 < count; j0 += lanes) {
    const int64_t units = std::min<int64_t>(lanes, count - j0);
    const T* unit_rows[lanes];
    T begin[lanes], end[lanes];  // counts of units, which T holds exactly
    for (int j = 0; j < lanes; ++j) {
      const int64_t unit = j0 + std::min<int64_t>(j, units - 1);
      const Range seen = range(unit);
      unit_rows[j] = w.data + unit * w.unit_stride;
      begin[j] = T(seen.begin);
      end[j] = T(std::max(seen.begin, seen.end));
    }
    const auto begins = Vec<T>::load(begin), ends = Vec<T>::load(end);
    const int64_t first = int64_t(begin[0]), last = int64_t(end[lanes - 1]);
    for (int64_t k0 = first / kSteps * kSteps; k0 < last; k0 += kSteps) {
      Vec<T> sum[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[r] = Vec<T>(T(0));
      const int64_t piece = std::min(k0 + kSteps, last);
      narrow_steps<Rows>(unit_rows, a, rows, std::max(k0, first), piece, begins,
                         min(ends, Vec<T>(T(piece))), int64_t(begin[lanes - 1]),
                         std::min(int64_t(end[0]), piece), sum);
      for (int r = 0; r < Rows; ++r) {
        T each[lanes];
        sum[r].store(each);
        for (int64_t j = 0; j < units; ++j) c[(j0 + j) * rows + r] += each[j];
      }
    }
  }
}

// stair_product for the `live` first rows of the tile, at least; w.step_stride is 1.
template <class T, class RangeOf>
void stair_product_rows(Strided<T> w, const T* a, T* c, int64_t rows, int64_t live, int64_t count,
                        const RangeOf& range) {
  if (live > kNarrowRows || count <= kUnits) {
    const int64_t vectors = (live + Vec<T>::lanes - 1) / Vec<T>::lanes;
    stair_product(w, a, c, rows, vectors, count, range);
    return;
  }
  with_constant<kNarrowRows>(
      live, [&](auto n) { narrow_product<decltype(n)::value>(w, a, c, rows, count, range); });
}

// Rows of W are asked for this many ahead of their use: wide rows are further apart than processors
// foresee.
inline constexpr int64_t kAhead = 16;

// narrow_product with the transpose of W, row by row as it lies: what the units `above`, each of
// which reads the first prefix[o] units below, add to the units `below`. start[j] is the first unit
// that reads j. Strips of Vectors vectors of units below are summed at a time.
template <int Rows, int Vectors, class T>
void narrow_transposed_rows(const T* w, int64_t columns, Range above, Range below,
                            const int32_t* prefix, const int32_t* start, const T* d, T* c,
                            int64_t rows) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t j0 = below.begin; j0 < below.end; j0 += Vectors * lanes) {
    const int64_t first = std::max<int64_t>(above.begin, start[j0]);
    for (int64_t k0 = first / kSteps * kSteps; k0 < above.end; k0 += kSteps) {
      Vec<T> sum[Rows][Vectors];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec<T>(T(0));
      for (int64_t o = std::max(k0, first); o < std::min(k0 + kSteps, above.end); ++o) {
        const T* row = w + o * columns + j0;
        const int64_t seen = std::min<int64_t>(prefix[o], below.end) - j0;
        const T* ahead = w + std::min(o + kAhead, above.end - 1) * columns + j0;
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) __builtin_prefetch(ahead + v * lanes);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          const int64_t count = std::clamp<int64_t>(seen - v * lanes, 0, lanes);
          const Vec<T> weights = load_up_to(row + v * lanes, count);
          const Mask<T> mask = first_lanes<T>(int(count));
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) {
            const Vec<T> more = multiply_add(weights, Vec<T>(d[o * rows + r]), sum[r][v]);
            sum[r][v] = count == lanes ? more : select(mask, more, sum[r][v]);
          }
        }
      }
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < Vectors; ++v) {
          T each[lanes];
          sum[r][v].store(each);
          const int64_t j = j0 + v * lanes;
          for (int64_t i = 0; i < std::min<int64_t>(lanes, below.end - j); ++i)
            c[(j + i) * rows + r] += each[i];
        }
    }
  }
}
template <class T>
void narrow_transposed(const T* w, int64_t columns, Range above, Range below, const int32_t* prefix,
                       const int32_t* start, const T* d, T* c, int64_t rows, int64_t live) {
  // about eight accumulators, and strips no wider than the units below
  with_constant<kNarrowRows>(live, [&](auto count) {
    constexpr int n = decltype(count)::value;
    const auto run = below.end - below.begin > 2 * Vec<T>::lanes
                         ? narrow_transposed_rows<n, 8 / n, T>
                         : narrow_transposed_rows<n, 2, T>;
    run(w, columns, above, below, prefix, start, d, c, rows);
  });
}

}  // namespace fastflow
