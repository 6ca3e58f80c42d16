// Linear algebra of as many rows of the batch as a vector has lanes, side by side: an entry of a
// row's matrix is a lane, so that every row passes through the same operations wherever it stands.
#pragma once

#include "../common/blocked.h"
#include "../common/vector_math.h"

namespace fastflow {

// A matrix that all rows share, as it lies in memory or turned over: w(m, k).
template <class T>
struct SharedMatrix {
  const T* data;
  int64_t rows, columns;
  int64_t row_step, column_step;

  SharedMatrix(const T* data, int64_t rows, int64_t columns)
      : data(data), rows(rows), columns(columns), row_step(columns), column_step(1) {}
  SharedMatrix turned() const {
    SharedMatrix other(data, columns, rows);
    other.row_step = column_step;
    other.column_step = row_step;
    return other;
  }
};

template <int Rows, int Columns, class T>
FASTFLOW_HD void product_block(const SharedMatrix<T>& w, int64_t m, const Vec<T>* x,
                               int64_t x_stride, Vec<T>* y, int64_t y_stride) {
  Vec<T> sum[Rows][Columns];
  y += m * y_stride;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) sum[i][n] = y[i * y_stride + n];
  const T* from = w.data + m * w.row_step;
  for (int64_t k = 0; k < w.columns; ++k, from += w.column_step, x += x_stride) {
    Vec<T> x_k[Columns];
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) x_k[n] = x[n];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> w_i(from[i * w.row_step]);
#pragma GCC unroll 2
      for (int n = 0; n < Columns; ++n) sum[i][n] += w_i * x_k[n];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) y[i * y_stride + n] = sum[i][n];
}

template <int Columns, class T>
void product_columns(const SharedMatrix<T>& w, const Vec<T>* x, int64_t x_stride, Vec<T>* y,
                     int64_t y_stride) {
  int64_t m = 0;
  for (; m + kBlock <= w.rows; m += kBlock)
    product_block<kBlock, Columns>(w, m, x, x_stride, y, y_stride);
  for (; m + 2 <= w.rows; m += 2) product_block<2, Columns>(w, m, x, x_stride, y, y_stride);
  if (m < w.rows) product_block<1, Columns>(w, m, x, x_stride, y, y_stride);
}

// y[m][n] += sum_k w(m, k) x[k][n] for n < columns.
template <class T>
void add_product(const SharedMatrix<T>& w, const Vec<T>* x, int64_t x_stride, Vec<T>* y,
                 int64_t y_stride, int64_t columns) {
  int64_t n = 0;
  for (; n + 2 <= columns; n += 2) product_columns<2>(w, x + n, x_stride, y + n, y_stride);
  if (n < columns) product_columns<1>(w, x + n, x_stride, y + n, y_stride);
}
// The same for vectors.
template <class T>
void add_product(const SharedMatrix<T>& w, const Vec<T>* x, Vec<T>* y) {
  add_product(w, x, 1, y, 1, 1);
}

// keep(a, b, sum over k of x(k, a) y(k, b)) for a < rows, b < columns; b <= a only if `lower`.
template <int Block, class T, class X, class Y, class Keep>
FASTFLOW_HD void lane_products_in(int64_t rows, int64_t columns, int64_t depth, bool lower, X x,
                                  Y y, Keep keep) {
  for (int64_t a0 = 0; a0 < rows; a0 += Block)
    for (int64_t b0 = 0; b0 < (lower ? std::min(columns, a0 + Block) : columns); b0 += Block) {
      int64_t a[Block], b[Block];
      Vec<T> sum[Block][Block];
#pragma GCC unroll 4
      for (int i = 0; i < Block; ++i) {
        a[i] = std::min(a0 + i, rows - 1);
        b[i] = std::min(b0 + i, columns - 1);
#pragma GCC unroll 4
        for (int j = 0; j < Block; ++j) sum[i][j] = Vec<T>(T(0));
      }
      for (int64_t k = 0; k < depth; ++k) {
        Vec<T> x_k[Block], y_k[Block];
#pragma GCC unroll 4
        for (int i = 0; i < Block; ++i) {
          x_k[i] = x(k, a[i]);
          y_k[i] = y(k, b[i]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < Block; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < Block; ++j) sum[i][j] += x_k[i] * y_k[j];
      }
#pragma GCC unroll 4
      for (int i = 0; i < Block; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < Block; ++j)
          if (a0 + i < rows && b0 + j < columns && (!lower || b0 + j <= a0 + i))
            keep(a0 + i, b0 + j, sum[i][j]);
    }
}
template <class T, class X, class Y, class Keep>
void lane_products(int64_t rows, int64_t columns, int64_t depth, bool lower, X x, Y y, Keep keep) {
  if (columns <= 2)
    lane_products_in<2, T>(rows, columns, depth, lower, x, y, keep);
  else
    lane_products_in<4, T>(rows, columns, depth, lower, x, y, keep);
}

// H = L diag(1 / r) L^T of the lower triangle of H (n, n), in place: L has ones on its diagonal,
// which are not written. Returns log det H, NaN where a pivot 1 / r is not positive.
template <class T>
Vec<T> factorise(int64_t n, Vec<T>* matrix, Vec<T>* reciprocals) {
  using V = Vec<T>;
  V log_det(T(0));
  for (int64_t j = 0; j < n; ++j) {
    const V pivot = matrix[j * n + j];
    reciprocals[j] = T(1) / pivot;
    log_det += select(pivot > T(0), log(pivot), V(T(__builtin_nan(""))));
    for (int64_t i = j + 1; i < n; ++i) {
      const V h = matrix[i * n + j], l = h * reciprocals[j];
      for (int64_t k = j + 1; k < i; ++k) matrix[i * n + k] -= h * matrix[k * n + j];
      matrix[i * n + i] -= h * l;
      matrix[i * n + j] = l;
    }
  }
  return log_det;
}

// g <- L^-1 g.
template <class T>
void solve_lower(int64_t n, const Vec<T>* factor, Vec<T>* g) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < i; ++k) g[i] -= factor[i * n + k] * g[k];
}
// g <- H^-1 L g.
template <class T>
void solve_upper(int64_t n, const Vec<T>* factor, const Vec<T>* reciprocals, Vec<T>* g) {
  for (int64_t i = 0; i < n; ++i) g[i] = g[i] * reciprocals[i];
  for (int64_t i = n - 1; i >= 0; --i)
    for (int64_t k = 0; k < i; ++k) g[k] -= factor[i * n + k] * g[i];
}

// inverse (n, n) = H^-1 from its factors; `work` (n, n).
template <class T>
void invert(int64_t n, const Vec<T>* factor, const Vec<T>* reciprocals, Vec<T>* work,
            Vec<T>* inverse) {
  using V = Vec<T>;
  for (int64_t i = 0; i < n; ++i) {  // work = L^-1
    for (int64_t j = 0; j < n; ++j) work[i * n + j] = V(T(i == j));
    for (int64_t k = 0; k < i; ++k) {
      const V l = factor[i * n + k];
      for (int64_t j = 0; j <= k; ++j) work[i * n + j] -= l * work[k * n + j];
    }
  }
  lane_products<T>(
      n, n, n, true, [&](int64_t k, int64_t a) { return work[k * n + a] * reciprocals[k]; },
      [&](int64_t k, int64_t b) { return work[k * n + b]; },
      [&](int64_t a, int64_t b, V sum) { inverse[a * n + b] = inverse[b * n + a] = sum; });
}

// Adds the sums over the lanes of one vector after the other to consecutive elements of memory.
template <class T>
class LaneSums {
 public:
  explicit LaneSums(T* to) : to_(to) {}
  ~LaneSums() {
    if (!count_) return;
    for (int i = count_; i < Vec<T>::lanes; ++i) rows_[i] = Vec<T>(T(0));
    add(count_);
  }
  LaneSums(const LaneSums&) = delete;
  LaneSums& operator=(const LaneSums&) = delete;

  FASTFLOW_HD void push(Vec<T> x) {
    rows_[count_++] = x;
    if (count_ < Vec<T>::lanes) return;
    add(count_);
    to_ += count_;
    count_ = 0;
  }

 private:
  FASTFLOW_HD void add(int n) { store_up_to(load_up_to(to_, n) + sum_each(rows_), to_, n); }
  T* to_;
  int count_ = 0;
  Vec<T> rows_[Vec<T>::lanes];
};

// to[m][n] += sum over v < count and the lanes of x[m][v] y[n][v]. Both have `stride` vectors to a
// row, and memory for rows up to a multiple of 4, which holds anything.
template <class T>
void add_outer(const Vec<T>* x, int64_t rows, const Vec<T>* y, int64_t columns, int64_t stride,
               int64_t count, T* to) {
  constexpr int lanes = Vec<T>::lanes;
  const T *x_rows = reinterpret_cast<const T*>(x), *y_rows = reinterpret_cast<const T*>(y);
  for (int64_t m = 0; m < rows; m += 4)
    for (int64_t n = 0; n < columns; n += 4) {
      alignas(64) T block[16];
      dots_4x4(x_rows + m * stride * lanes, y_rows + n * stride * lanes, stride * lanes,
               count * lanes, block);
      for (int64_t i = 0; i < std::min<int64_t>(4, rows - m); ++i)
        for (int64_t j = 0; j < std::min<int64_t>(4, columns - n); ++j)
          to[(m + i) * columns + n + j] += block[4 * i + j];
    }
}

}  // namespace fastflow
