// Register-blocked products of a tile of rows with a few vectors, the work of a shared chain.
//
// A tile has kTileRows rows. Quantities of one number a row and step are kept "by step",
// x[i * width + row], rows contiguous; batch tensors stay as they are, row after row. Rows past
// the end of the batch are computed as zeros and never loaded or stored, so that every row passes
// through the same operations wherever it stands.
#pragma once

#include <algorithm>

#include "vector.h"

namespace fastflow {

inline constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Accumulators are kBlock x 2 vectors: 16 of 32 registers, or 8 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kBlock = 8;
#else
inline constexpr int kBlock = 4;
#endif

// Four vectors: enough independent work to hide the latency of long computations on each row.
inline constexpr int kTileVectors = 4;
template <class T>
inline constexpr int kTileRows = kTileVectors * Vec<T>::lanes;

// Elements between padded rows of n: whole cache lines, an odd number of them, so that a column
// of rows does not fall into one cache set.
template <class T>
constexpr int64_t padded_stride(int64_t n) {
  const int64_t line = 64 / int64_t(sizeof(T));
  return (round_up(n, line) / line | 1) * line;
}

// The first n elements (any n >= 0) of memory as a vector, zeros beyond.
template <class T>
FASTFLOW_HD Vec<T> load_up_to(const T* p, int64_t n) {
  return n >= Vec<T>::lanes ? Vec<T>::load(p) : load_partial(p, int(n));
}
template <class T>
FASTFLOW_HD void store_up_to(Vec<T> x, T* p, int64_t n) {
  if (n >= Vec<T>::lanes)
    x.store(p);
  else
    store_partial(x, p, int(n));
}

// Long sums are made of short ones (of 64 columns, of a tile's rows): their rounding errors grow
// with the length of the parts, not of the whole.
template <class T>
FASTFLOW_HD void add_to(T* p, Vec<T> x) {
  (Vec<T>::load(p) + x).store(p);
}

// by_step[d * width + row] = rows[row * stride + d] for d < round_up(n, lanes), row < width.
template <class T>
void transpose_in(const T* rows, int64_t stride, int64_t row_count, int64_t n, T* by_step,
                  int64_t width) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t row = 0; row < width; row += lanes) {
    const int64_t live = std::clamp<int64_t>(row_count - row, 0, lanes);
    for (int64_t d = 0; d < n; d += lanes) {
      Vec<T> block[lanes];
      const T* from = rows + row * stride + d;
      if (live == lanes && n - d >= lanes) {
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r) block[r] = Vec<T>::load(from + r * stride);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r)
          block[r] = r < live ? load_up_to(from + r * stride, n - d) : Vec<T>(T(0));
      }
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) block[r].store(by_step + (d + r) * width + row);
    }
  }
}

// rows[row * stride + d] = by_step[d * width + row] for row < row_count, d < n.
template <class T>
void transpose_out(const T* by_step, int64_t width, int64_t n, T* rows, int64_t stride,
                   int64_t row_count) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t row = 0; row < row_count; row += lanes) {
    const int64_t live = std::min<int64_t>(row_count - row, lanes);
    for (int64_t d = 0; d < n; d += lanes) {
      Vec<T> block[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r)
        block[r] = d + r < n ? Vec<T>::load(by_step + (d + r) * width + row) : Vec<T>(T(0));
      transpose(block);
      T* to = rows + row * stride + d;
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r)
        if (r < live) store_up_to(block[r], to + r * stride, n - d);
    }
  }
}

// panels[(i / kBlock) * D * kBlock + d * kBlock + i % kBlock] = matrix[i * stride + d]; the last
// row stands in for those past K.
template <class T>
void pack_panels(const T* matrix, int64_t stride, int64_t K, int64_t D, T* panels) {
  for (int64_t i0 = 0; i0 < K; i0 += kBlock, panels += D * kBlock) {
    const T* rows[kBlock];
    for (int i = 0; i < kBlock; ++i) rows[i] = matrix + std::min(i0 + i, K - 1) * stride;
    for (int64_t d = 0; d < D; ++d)
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) panels[d * kBlock + i] = rows[i][d];
  }
}

// tile_dots for two vectors of rows.
template <class T>
void dots_block(const T* rows, int64_t row_count, int64_t D, const T* panels, int64_t K, T* out) {
  constexpr int lanes = Vec<T>::lanes, width = 2 * lanes, columns = 64;
  alignas(64) T transposed[columns * width];
  for (int64_t d0 = 0; d0 < D; d0 += columns) {
    const int64_t n = std::min<int64_t>(columns, D - d0);
    transpose_in(rows + d0, D, row_count, n, transposed, width);
    for (int64_t i0 = 0; i0 < K; i0 += kBlock) {
      const T* panel = panels + i0 * D + d0 * kBlock;
      T* target = out + i0 * kTileRows<T>;
      Vec<T> sum[kBlock][2];
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) sum[i][0] = sum[i][1] = Vec<T>(T(0));
      for (int64_t d = 0; d < n; ++d) {
        const Vec<T> x0 = Vec<T>::load(transposed + d * width);
        const Vec<T> x1 = Vec<T>::load(transposed + d * width + lanes);
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i) {
          const Vec<T> m(panel[d * kBlock + i]);
          sum[i][0] += m * x0;
          sum[i][1] += m * x1;
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i)
        for (int h = 0; h < 2; ++h) {
          T* p = target + i * kTileRows<T> + h * lanes;
          (d0 ? Vec<T>::load(p) + sum[i][h] : sum[i][h]).store(p);
        }
    }
  }
}

// tile_dots for Steps steps without panels: along the rows as they lie, which is less work than
// bringing them into lanes where there are few steps.
template <int Steps, class T>
void dots_along_rows(const T* rows, int64_t row_count, int64_t D, const T* matrix, int64_t stride,
                     T* out) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t row = 0; row < kTileRows<T>; row += lanes) {
    Vec<T> sums[Steps][lanes];
    for (int r = 0; r < lanes; ++r) {
      Vec<T> sum[Steps];
#pragma GCC unroll 4
      for (int i = 0; i < Steps; ++i) sum[i] = Vec<T>(T(0));
      const auto add = [&](Vec<T> x, int64_t d) {
#pragma GCC unroll 4
        for (int i = 0; i < Steps; ++i) sum[i] += x * Vec<T>::load(matrix + i * stride + d);
      };
      if (row + r < row_count) {
        const T* x = rows + (row + r) * D;
        int64_t d = 0;
        for (; d + lanes <= D; d += lanes) add(Vec<T>::load(x + d), d);
        if (d < D) add(load_partial(x + d, int(D - d)), d);
      }
#pragma GCC unroll 4
      for (int i = 0; i < Steps; ++i) sums[i][r] = sum[i];
    }
    for (int i = 0; i < Steps; ++i) sum_each(sums[i]).store(out + i * kTileRows<T> + row);
  }
}

// out[i] = rows . matrix_i for the rows of a tile, by step; `out` has round_up(K, kBlock) steps,
// those past K void. `panels` is `matrix`, whose rows are padded with zeros, from pack_panels.
template <class T>
void tile_dots(const T* rows, int64_t row_count, int64_t D, const T* matrix, int64_t stride,
               const T* panels, int64_t K, T* out) {
  if (K <= 4 && D >= 2 * Vec<T>::lanes) {
    const auto dots = K == 1   ? dots_along_rows<1, T>
                      : K == 2 ? dots_along_rows<2, T>
                      : K == 3 ? dots_along_rows<3, T>
                               : dots_along_rows<4, T>;
    dots(rows, row_count, D, matrix, stride, out);
    return;
  }
  constexpr int width = 2 * Vec<T>::lanes;
  for (int64_t row = 0; row < kTileRows<T>; row += width)
    dots_block(rows + row * D, std::clamp<int64_t>(row_count - row, 0, width), D, panels, K,
               out + row);
}

// The columns [d, d + Vectors * lanes) of tile_update for kBlock rows.
template <int Vectors, class T>
FASTFLOW_HD void update_block(const T* in, T* out, int64_t live, int64_t D, int64_t d,
                              const T* coefficients, const T* matrix, int64_t stride, int64_t K) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> sum[kBlock][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v)
      sum[r][v] =
          r < live ? load_up_to(in + r * D + d + v * lanes, D - d - v * lanes) : Vec<T>(T(0));
  for (int64_t i = 0; i < K; ++i) {
    Vec<T> m[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) m[v] = Vec<T>::load(matrix + i * stride + d + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      const Vec<T> c(coefficients[i * kTileRows<T> + r]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] += c * m[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v)
      if (r < live) store_up_to(sum[r][v], out + r * D + d + v * lanes, D - d - v * lanes);
}

// out = in + sum_i coefficients_i matrix_i for the rows of a tile; coefficients by step, the rows
// of `matrix` padded with zeros to whole vectors.
template <class T>
void tile_update(const T* in, T* out, int64_t row_count, int64_t D, const T* coefficients,
                 const T* matrix, int64_t stride, int64_t K) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t r = 0; r < row_count; r += kBlock) {
    const int64_t live = std::min<int64_t>(kBlock, row_count - r);
    int64_t d = 0;
    for (; D - d > lanes; d += 2 * lanes)
      update_block<2>(in + r * D, out + r * D, live, D, d, coefficients + r, matrix, stride, K);
    if (d < D)
      update_block<1>(in + r * D, out + r * D, live, D, d, coefficients + r, matrix, stride, K);
  }
}

template <int Steps, int Vectors, class T>
FASTFLOW_HD void accumulate_block(T* sums, int64_t sum_stride, const T* coefficients,
                                  int64_t coefficient_stride, const T* rows, int64_t stride,
                                  int64_t row_count, int64_t n) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> sum[Steps][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Steps; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sum[i][v] = Vec<T>(T(0));
  const auto add = [&](auto load) {
    for (int64_t r = 0; r < row_count; ++r) {
      Vec<T> x[Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) x[v] = load(rows + r * stride + v * lanes, v);
#pragma GCC unroll 8
      for (int i = 0; i < Steps; ++i) {
        const Vec<T> c(coefficients[i * coefficient_stride + r]);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) sum[i][v] += c * x[v];
      }
    }
  };
  if (n >= Vectors * lanes)
    add([](const T* p, int) { return Vec<T>::load(p); });
  else
    add([n](const T* p, int v) { return load_up_to(p, n - v * lanes); });
#pragma GCC unroll 8
  for (int i = 0; i < Steps; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) add_to(sums + i * sum_stride + v * lanes, sum[i][v]);
}

template <int Steps, class T>
void accumulate_steps(T* sums, int64_t sum_stride, const T* coefficients,
                      int64_t coefficient_stride, const T* rows, int64_t stride, int64_t row_count,
                      int64_t D) {
  constexpr int lanes = Vec<T>::lanes;
  int64_t d = 0;
  for (; D - d > lanes; d += 2 * lanes)
    accumulate_block<Steps, 2>(sums + d, sum_stride, coefficients, coefficient_stride, rows + d,
                               stride, row_count, D - d);
  if (d < D)
    accumulate_block<Steps, 1>(sums + d, sum_stride, coefficients, coefficient_stride, rows + d,
                               stride, row_count, D - d);
}

// sums_i += sum over rows of coefficients[i, row] rows[row, :] for the first kBlock of `steps`
// steps i; the rows of `sums` are padded to whole vectors. Where there are fewer than kBlock steps,
// what lies at the places of some of the others changes too.
template <class T>
void accumulate(T* sums, int64_t sum_stride, const T* coefficients, int64_t coefficient_stride,
                const T* rows, int64_t stride, int64_t row_count, int64_t D, int64_t steps) {
  const auto run = steps == 1   ? accumulate_steps<1, T>
                   : steps == 2 ? accumulate_steps<2, T>
                   : steps <= 4 ? accumulate_steps<4, T>
                                : accumulate_steps<kBlock, T>;
  run(sums, sum_stride, coefficients, coefficient_stride, rows, stride, row_count, D);
}

// block[4 i + j] = x_i . y_j for 4 rows of x and of y, over n elements and the zeros up to a whole
// vector.
template <class T>
void dots_4x4(const T* x, const T* y, int64_t stride, int64_t n, T* block) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> sums[16 / lanes][lanes];
  for (auto& group : sums)
    for (auto& sum : group) sum = Vec<T>(T(0));
  for (int64_t d = 0; d < n; d += lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec<T> x_i = Vec<T>::load(x + i * stride + d);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        sums[(4 * i + j) / lanes][(4 * i + j) % lanes] += x_i * Vec<T>::load(y + j * stride + d);
    }
  }
#pragma GCC unroll 8
  for (int group = 0; group < 16 / lanes; ++group)
    sum_each(sums[group]).store(block + group * lanes);
}

}  // namespace fastflow
