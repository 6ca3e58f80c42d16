// The products of staircase.h with a matrix whose rows and columns lie in any order, for the few
// rows of a batch to which a sorted copy of all weights would not pay. A piece of the matrix at a
// time is brought into order in the cache, or its columns are compared with what a row sees. Every
// unit sums the same terms in the same order and the same pieces as it does with sorted weights: a
// row gets the same bits.
#pragma once

#include <numeric>

#include "staircase_narrow.h"

namespace fastflow {

// A matrix W (rows, columns) as it lies. In sorted order row k is row order[k] of W and sees the
// columns whose place is less than prefix[k].
template <class T>
struct Unsorted {
  const T* data;
  int64_t rows;
  int64_t columns;
  const int32_t* order;   // (rows)
  const int32_t* prefix;  // (rows), nondecreasing
  const int32_t* start;   // (columns): the first row that sees place j
  const int32_t* place;   // (columns): of column i
  const T* places;        // the same to compare with, and `columns` up to a whole vector

  const T* row(int64_t k) const { return data + order[k] * columns; }
};

// Units of a panel: whole vectors of units, and whole blocks of kUnits.
inline constexpr int kPanelVectors = 3;
template <class T>
inline constexpr int64_t kPanelUnits = kPanelVectors * Vec<T>::lanes;
static_assert(kPanelUnits<float> % kUnits == 0 && kPanelUnits<double> % kUnits == 0);

// Elements of a panel for unsorted_product and for unsorted_transposed.
template <class T>
int64_t panel_size(const Unsorted<T>& w) {
  return kPanelUnits<T> * (w.columns + 1);
}
template <class T>
int64_t transposed_panel_size(const Unsorted<T>& w) {
  return kPanelUnits<T> * padded_stride<T>(w.rows);
}

// panel[k * kPanelUnits + j] = weight of unit first + j at place k, for the places k < last. What
// lies beyond goes to place `last`, where nobody reads it. The last of `count` units stands in for
// those after it.
template <class T>
void sort_columns(const Unsorted<T>& w, int64_t first, int64_t count, int64_t last, T* panel) {
  constexpr int lanes = Vec<T>::lanes;
  constexpr int64_t ahead = 4 * lanes;
  for (int64_t j0 = 0; j0 < kPanelUnits<T>; j0 += lanes) {
    const T* rows[lanes];
    for (int j = 0; j < lanes; ++j) rows[j] = w.row(first + std::min(j0 + j, count - 1));
    for (int64_t i = 0; i < w.columns; i += lanes) {
      const int64_t n = std::min<int64_t>(lanes, w.columns - i);
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int j = 0; j < lanes; ++j) {
        square[j] = load_up_to(rows[j] + i, n);
        __builtin_prefetch(rows[j] + std::min(i + ahead, w.columns - 1));
      }
      transpose(square);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k)
        if (k < n)
          square[k].store(panel + std::min<int64_t>(w.place[i + k], last) * kPanelUnits<T> + j0);
    }
  }
}

// c[j] += sum over k < prefix[j] of panel(j, k) a[k], for the `count` units of a panel from
// sort_columns and the first `live` <= Rows rows of the tile. Lanes are units.
template <int Rows, class T>
void panel_product(const T* panel, const int32_t* prefix, int64_t count, const T* a, T* c,
                   int64_t rows, int64_t live) {
  constexpr int lanes = Vec<T>::lanes;
  T ends[kPanelUnits<T>];  // counts of units, which T holds exactly
  for (int64_t j = 0; j < kPanelUnits<T>; ++j) ends[j] = T(prefix[std::min(j, count - 1)]);
  const int64_t all = prefix[0], last = prefix[count - 1];
  for (int64_t k0 = 0; k0 < last; k0 += kSteps) {
    Vec<T> sum[kPanelVectors][Rows];
#pragma GCC unroll 3
    for (int v = 0; v < kPanelVectors; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[v][r] = Vec<T>(T(0));
    const auto steps = [&](int64_t begin, int64_t end, auto seen) FASTFLOW_INLINE_LAMBDA {
      for (int64_t k = begin; k < end; ++k)
#pragma GCC unroll 3
        for (int v = 0; v < kPanelVectors; ++v) {
          const Vec<T> weights = Vec<T>::load(panel + k * kPanelUnits<T> + v * lanes);
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r)
            sum[v][r] =
                seen(v, k, multiply_add(weights, Vec<T>(a[k * rows + r]), sum[v][r]), sum[v][r]);
        }
    };
    const int64_t end = std::min(k0 + kSteps, last), middle = std::clamp(all, k0, end);
    steps(k0, middle,
          [](int, int64_t, Vec<T> more, Vec<T>) FASTFLOW_INLINE_LAMBDA { return more; });
    steps(middle, end, [&](int v, int64_t k, Vec<T> more, Vec<T> less) FASTFLOW_INLINE_LAMBDA {
      return select(Vec<T>::load(ends + v * lanes) > Vec<T>(T(k)), more, less);
    });
    for (int v = 0; v < kPanelVectors; ++v)
      for (int r = 0; r < std::min<int64_t>(Rows, live); ++r) {
        T each[lanes];
        sum[v][r].store(each);
        for (int64_t j = v * lanes; j < std::min<int64_t>((v + 1) * lanes, count); ++j)
          c[j * rows + r] += each[j - v * lanes];
      }
  }
}

// Up to so many rows lanes are units; from there on they are rows.
inline constexpr int kPanelRows = kBlock;

// f(std::integral_constant<int, n>) for a power of two n >= rows, rows <= kPanelRows.
template <class F>
FASTFLOW_HD void with_rows(int64_t rows, const F& f) {
  if (rows == 1) return f(std::integral_constant<int, 1>{});
  if (rows == 2) return f(std::integral_constant<int, 2>{});
  if (rows <= 4) return f(std::integral_constant<int, 4>{});
  if constexpr (kPanelRows > 4) f(std::integral_constant<int, kPanelRows>{});
}

// c[j] += sum over k < prefix[j] of W(j, k) a[k] for units first .. first + count - 1, at most
// kPanelUnits; c is at the first one.
template <class T>
void unsorted_product(const Unsorted<T>& w, int64_t first, int64_t count, const T* a, T* c,
                      int64_t rows, int64_t live, T* panel) {
  const int32_t* prefix = w.prefix + first;
  const int64_t last = prefix[count - 1];
  if (last == 0) return;
  sort_columns(w, first, count, last, panel);
  if (live <= kPanelRows) {
    with_rows(live, [&](auto n) { panel_product<n>(panel, prefix, count, a, c, rows, live); });
    return;
  }
  stair_product(Strided<T>{panel, 1, kPanelUnits<T>}, a, c, rows,
                (live + Vec<T>::lanes - 1) / Vec<T>::lanes, count,
                [&](int64_t j) { return Range{0, prefix[j]}; });
}

// What the rows of W that see them add to the columns first .. first + Vectors * lanes - 1, c by
// place, for the first `live` <= Rows rows of the tile. Lanes are columns.
template <int Rows, int Vectors, class T>
void compared_columns(const Unsorted<T>& w, int64_t first, const T* d, T* c, int64_t rows,
                      int64_t live) {
  constexpr int lanes = Vec<T>::lanes;
  const int64_t count = std::min<int64_t>(Vectors * lanes, w.columns - first);
  const int64_t vectors = (count + lanes - 1) / lanes;
  const int32_t* place = w.place + first;
  const int64_t begin = w.start[*std::min_element(place, place + count)];
  Vec<T> places[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v)
    places[v] = Vec<T>::load(w.places + first + std::min<int64_t>(v, vectors - 1) * lanes);
  for (int64_t k0 = begin / kSteps * kSteps; k0 < w.rows; k0 += kSteps) {
    Vec<T> sum[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec<T>(T(0));
    const auto steps = [&](auto load) FASTFLOW_INLINE_LAMBDA {
      for (int64_t o = std::max(k0, begin); o < std::min(k0 + kSteps, w.rows); ++o) {
        const T* row = w.row(o) + first;
        const T* ahead = w.row(std::min(o + kAhead, w.rows - 1)) + first;
        const Vec<T> seen(T(w.prefix[o]));
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          __builtin_prefetch(ahead + v * lanes);
          const Vec<T> weights = load(row, v);
          const Mask<T> mask = places[v] < seen;
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r)
            sum[r][v] =
                select(mask, multiply_add(weights, Vec<T>(d[o * rows + r]), sum[r][v]), sum[r][v]);
        }
      }
    };
    if (count == Vectors * lanes)
      steps([](const T* row, int v)
                FASTFLOW_INLINE_LAMBDA { return Vec<T>::load(row + v * lanes); });
    else
      steps([&](const T* row, int v) FASTFLOW_INLINE_LAMBDA {
        return load_up_to(row + v * lanes, std::max<int64_t>(count - v * lanes, 0));
      });
    for (int r = 0; r < std::min<int64_t>(Rows, live); ++r)
      for (int v = 0; v < Vectors; ++v) {
        T each[lanes];
        sum[r][v].store(each);
        for (int64_t i = v * lanes; i < std::min<int64_t>((v + 1) * lanes, count); ++i)
          c[place[i] * rows + r] += each[i - v * lanes];
      }
  }
}

// Columns that unsorted_transposed takes at a time: wide pieces of the rows of W for few sums each.
template <class T>
int64_t strip_columns(int64_t live) {
  return (live == 1             ? 2 * kVectors
          : live <= kNarrowRows ? kVectors
                                : kPanelVectors) *
         Vec<T>::lanes;
}

// c[place of column i] += sum over the rows k that see it of W(k, i) d[k], for the columns from
// `first`, strip_columns of them.
template <class T>
void unsorted_transposed(const Unsorted<T>& w, int64_t first, const T* d, T* c, int64_t rows,
                         int64_t live, T* panel, T* sums) {
  constexpr int lanes = Vec<T>::lanes;
  if (live == 1) return compared_columns<1, 2 * kVectors>(w, first, d, c, rows, live);
  if (live == 2) return compared_columns<2, kVectors>(w, first, d, c, rows, live);
  if (live <= kNarrowRows) return compared_columns<4, kVectors>(w, first, d, c, rows, live);

  const int64_t count = std::min(kPanelUnits<T>, w.columns - first);
  const int32_t* place = w.place + first;
  int32_t by_place[kPanelUnits<T>], rank[kPanelUnits<T>];
  std::iota(by_place, by_place + count, 0);
  std::sort(by_place, by_place + count, [&](int32_t i, int32_t j) { return place[i] < place[j]; });
  for (int64_t j = 0; j < count; ++j) rank[by_place[j]] = int32_t(j);

  const int64_t stride = padded_stride<T>(w.rows);
  const int64_t begin = w.start[place[by_place[0]]];
  for (int64_t o = begin / lanes * lanes; o < w.rows; o += lanes)
    for (int64_t i = 0; i < count; i += lanes) {
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) {
        square[k] = load_up_to(w.row(std::min(o + k, w.rows - 1)) + first + i, count - i);
        __builtin_prefetch(w.row(std::min(o + k + kAhead, w.rows - 1)) + first + i);
      }
      transpose(square);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k)
        if (i + k < count) square[k].store(panel + rank[i + k] * stride + o);
    }
  for (int64_t j = 0; j < count; ++j)
    std::copy_n(c + place[by_place[j]] * rows, rows, sums + j * rows);
  stair_product(Strided<T>{panel, stride, 1}, d, sums, rows, (live + lanes - 1) / lanes, count,
                [&](int64_t j) { return Range{w.start[place[by_place[j]]], w.rows}; });
  for (int64_t j = 0; j < count; ++j)
    std::copy_n(sums + j * rows, rows, c + place[by_place[j]] * rows);
}

}  // namespace fastflow
