// Register-blocked products with a staircase matrix: in sorted order unit j of a level reads a
// range of the units of the level before, and neither end of the range ever decreases with j. What
// lies outside is not read, let alone multiplied.
//
// Activations are by unit: a tile has `rows` rows (a multiple of the vector width) of a batch and
// holds unit k at a[k * rows ..]. The lanes of vectors are rows of the batch, so that a row passes
// through the same operations, in the same order, wherever it stands.
#pragma once

#include <algorithm>
#include <type_traits>

#include "blocked.h"

namespace fastflow {

// Accumulators are kUnits x kVectors vectors: 24 of 32 registers, or 12 of 16.
#if defined(__GNUC__)
#define FASTFLOW_INLINE_LAMBDA __attribute__((always_inline))
#else
#define FASTFLOW_INLINE_LAMBDA
#endif

inline constexpr int kUnits = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kVectors = 4;
#else
inline constexpr int kVectors = 2;
#endif

// A matrix with element (unit, step) at data[unit * unit_stride + step * step_stride]; products
// contract over steps. W (rows, columns) by row is {w, columns, 1}, its transpose {w, 1, columns}.
template <class T>
struct Strided {
  const T* data;
  int64_t unit_stride;
  int64_t step_stride;

  Strided from_unit(int64_t unit) const {
    return {data + unit * unit_stride, unit_stride, step_stride};
  }
};

// The same, its units in panels of kUnits: element (unit, step) at
// data[unit / kUnits * kUnits * steps + step * kUnits + unit % kUnits]. A transpose read in place
// would touch a page per step.
template <class T>
struct Packed {
  const T* data;
  int64_t steps;

  Strided<T> from_unit(int64_t unit) const { return {data + unit * steps, 1, kUnits}; }
};

// Steps begin .. end - 1 that a unit contracts over; empty if begin >= end.
struct Range {
  int64_t begin;
  int64_t end;
};

// f(std::integral_constant<int, 0>), ..., f(std::integral_constant<int, N - 1>)
template <int... Index, class F>
FASTFLOW_HD void unrolled(std::integer_sequence<int, Index...>, const F& f) {
  (f(std::integral_constant<int, Index>{}), ...);
}
template <int N, class F>
FASTFLOW_HD void unrolled(const F& f) {
  unrolled(std::make_integer_sequence<int, N>{}, f);
}

// c[j] += sum over k in [begin[j], end[j]) of w(j, k) a[k], for Units units and Vectors vectors.
template <int Units, int Vectors, class T>
inline void stair_block(const Strided<T>& w, const T* a, T* c, int64_t rows, const int64_t* begin,
                        const int64_t* end) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> sum[Units][Vectors];
#pragma GCC unroll 8
  for (int j = 0; j < Units; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[j][v] = Vec<T>(T(0));

  // One step of the contraction for units First .. Last - 1.
  const auto step = [&](auto first, auto last, int64_t k) FASTFLOW_INLINE_LAMBDA {
    constexpr int First = decltype(first)::value, Last = decltype(last)::value;
    const T* column = w.data + k * w.step_stride;
    Vec<T> x[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) x[v] = Vec<T>::load(a + k * rows + v * lanes);
#pragma GCC unroll 8
    for (int j = First; j < Last; ++j) {
      const Vec<T> weight(column[j * w.unit_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[j][v] += weight * x[v];
    }
  };
  constexpr std::integral_constant<int, 0> none{};
  constexpr std::integral_constant<int, Units> all{};
  if (begin[Units - 1] <= end[0]) {
    // The steps of some units, of all, of some: each unit sees its own in ascending order.
    int64_t k = begin[0];
    unrolled<Units - 1>([&](auto j) FASTFLOW_INLINE_LAMBDA {
      constexpr std::integral_constant<int, decltype(j)::value + 1> next{};
      for (; k < begin[next]; ++k) step(none, next, k);
    });
    for (; k < end[0]; ++k) step(none, all, k);
    unrolled<Units - 1>([&](auto j) FASTFLOW_INLINE_LAMBDA {
      constexpr std::integral_constant<int, decltype(j)::value + 1> next{};
      for (; k < end[next]; ++k) step(next, all, k);
    });
  } else {
    unrolled<Units>([&](auto j) FASTFLOW_INLINE_LAMBDA {
      constexpr std::integral_constant<int, decltype(j)::value + 1> next{};
      for (int64_t k = begin[j]; k < end[j]; ++k) step(j, next, k);
    });
  }
#pragma GCC unroll 8
  for (int j = 0; j < Units; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) add_to(c + j * rows + v * lanes, sum[j][v]);
}

// Asks for the cache lines of memory that is needed soon.
template <class T>
FASTFLOW_HD void prefetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i);
}

// f(std::integral_constant<int, n>) for the run-time n = 1 .. N.
template <int N, class F>
FASTFLOW_HD void with_constant(int64_t n, const F& f) {
  unrolled<N>([&](auto i) FASTFLOW_INLINE_LAMBDA {
    if (n == i + 1) f(std::integral_constant<int, decltype(i)::value + 1>{});
  });
}

// Contractions are cut into pieces of this many steps, at its multiples: what is added is a sum of
// short sums, whose cut does not depend on how units are blocked.
inline constexpr int64_t kSteps = 256;

// One block of stair_product: its first Units units.
template <int Units, class T, class RangeOf>
void stair_units(const Strided<T>& w, const T* a, T* c, int64_t rows, int64_t vectors,
                 const RangeOf& range) {
  constexpr int lanes = Vec<T>::lanes;
  Range ranges[Units];
#pragma GCC unroll 8
  for (int j = 0; j < Units; ++j) {
    ranges[j] = range(j);
    ranges[j].end = std::max(ranges[j].begin, ranges[j].end);
  }
  const int64_t last = ranges[Units - 1].end;
  for (int64_t k0 = ranges[0].begin / kSteps * kSteps; k0 < last; k0 += kSteps) {
    int64_t begin[Units], end[Units];
#pragma GCC unroll 8
    for (int j = 0; j < Units; ++j) {
      begin[j] = std::clamp(ranges[j].begin, k0, k0 + kSteps);
      end[j] = std::clamp(ranges[j].end, k0, k0 + kSteps);
    }
    const auto block = [&](auto width, int64_t v) {
      stair_block<Units, width>(w, a + v * lanes, c + v * lanes, rows, begin, end);
    };
    int64_t v = 0;
    for (; v + kVectors <= vectors; v += kVectors)
      block(std::integral_constant<int, kVectors>{}, v);
    for (; v + 2 <= vectors; v += 2) block(std::integral_constant<int, 2>{}, v);
    if (v < vectors) block(std::integral_constant<int, 1>{}, v);
  }
}

// c[j] += sum over k in range(j) of w(j, k) a[k] for units j < count, and the first `vectors`
// vectors of the rows of the tile. Both ends of range(j) must not decrease with j. before(j, n) and
// after(j, n) are called around the work on c[j] .. c[j + n - 1], which is then in the cache.
template <class T, class Matrix, class RangeOf, class Before, class After>
void stair_product(const Matrix& w, const T* a, T* c, int64_t rows, int64_t vectors, int64_t count,
                   const RangeOf& range, const Before& before, const After& after) {
  for (int64_t j0 = 0; j0 < count; j0 += kUnits) {
    const int64_t units = std::min<int64_t>(kUnits, count - j0);
    before(j0, units);
    with_constant<kUnits>(units, [&](auto n) {
      stair_units<n>(w.from_unit(j0), a, c + j0 * rows, rows, vectors,
                     [&](int64_t j) { return range(j0 + j); });
    });
    after(j0, units);
  }
}
template <class T, class Matrix, class RangeOf>
void stair_product(const Matrix& w, const T* a, T* c, int64_t rows, int64_t vectors, int64_t count,
                   const RangeOf& range) {
  const auto nothing = [](int64_t, int64_t) {};
  stair_product(w, a, c, rows, vectors, count, range, nothing, nothing);
}

// Units in a panel: what stair_outer reads of one row at a time.
template <class T>
inline constexpr int64_t kPanel = kVectors * Vec<T>::lanes;

// Rows whose products are summed without a break: sums over more are sums of such sums.
inline constexpr int64_t kOuterRows = 256;

// The way from tiles to panels: panels[(j / kPanel) * panel_rows * kPanel + row * kPanel +
// j % kPanel] = tile[j * rows + row] for j < count and row < live; `panels` is at the tile's first
// row. Lanes that stand for no unit are zeros. With `place`, unit place[j] stands at j.
template <class T>
void tile_to_panels(const T* tile, int64_t rows, int64_t live, int64_t count, const int32_t* place,
                    T* panels, int64_t panel_rows) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t j0 = 0; j0 < count; j0 += lanes)
    for (int64_t r0 = 0; r0 < live; r0 += lanes) {
      Vec<T> block[lanes];
#pragma GCC unroll 16
      for (int j = 0; j < lanes; ++j)
        block[j] = j0 + j < count
                       ? Vec<T>::load(tile + (place ? place[j0 + j] : j0 + j) * rows + r0)
                       : Vec<T>(T(0));
      transpose(block);
      T* to = panels + j0 / kPanel<T> * panel_rows * kPanel<T> + r0 * kPanel<T> + j0 % kPanel<T>;
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r)
        if (r0 + r < live) block[r].store(to + r * kPanel<T>);
    }
}

// out[o] += sum over n rows of d[o] panel, for Outs units and the first Vectors vectors of a panel,
// where d[o] of a row is at d[(row / rows) * d_stride + o * rows + row % rows]; row 0 begins a
// tile.
template <int Outs, int Vectors, class T, class Add>
inline void outer_block(const T* d, int64_t d_stride, int64_t rows, const T* panel, int64_t n,
                        const Add& add) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> sum[Outs][Vectors];
#pragma GCC unroll 8
  for (int o = 0; o < Outs; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[o][v] = Vec<T>(T(0));
  for (; n > 0; n -= rows, d += d_stride) {
    const int64_t live = std::min(n, rows);
    for (int64_t r = 0; r < live; ++r, panel += kPanel<T>) {
      Vec<T> x[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) x[v] = Vec<T>::load(panel + v * lanes);
#pragma GCC unroll 8
      for (int o = 0; o < Outs; ++o) {
        const Vec<T> g(d[o * rows + r]);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[o][v] += g * x[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < Outs; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) add(o, v, sum[o][v]);
}

// add(o, i, n, sums) with lane j < n of `sums` = sum over row_count rows of d[o] a[i + j], such
// that each o in [first, last) and i + j < prefix[o] comes up once per kOuterRows rows.
template <class T, class Add>
void stair_outer(const T* d, int64_t d_stride, int64_t rows, const T* panels, int64_t panel_rows,
                 int64_t row_count, const int32_t* prefix, int64_t first, int64_t last,
                 const Add& add) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t row = 0; row < row_count; row += kOuterRows)
    for (int64_t i0 = 0; i0 < prefix[last - 1]; i0 += kPanel<T>) {
      const T* panel = panels + i0 * panel_rows + row * kPanel<T>;
      int64_t o0 = std::upper_bound(prefix + first, prefix + last, int32_t(i0)) - prefix;
      for (; o0 < last; o0 += kUnits) {
        const int64_t outs = std::min<int64_t>(kUnits, last - o0);
        const int64_t ins = std::min<int64_t>(kPanel<T>, prefix[o0 + outs - 1] - i0);
        const auto emit = [&](int64_t o, int64_t v, Vec<T> sums) {
          const int64_t n = std::min<int64_t>(lanes, prefix[o0 + o] - i0 - v * lanes);
          if (n > 0) add(o0 + o, i0 + v * lanes, n, sums);
        };
        with_constant<kUnits>(outs, [&](auto m) {
          with_constant<kVectors>((ins + lanes - 1) / lanes, [&](auto v) {
            outer_block<m, v>(d + row / rows * d_stride + o0 * rows, d_stride, rows, panel,
                              std::min(kOuterRows, row_count - row), emit);
          });
        });
      }
    }
}

}  // namespace fastflow
