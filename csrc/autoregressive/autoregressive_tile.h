// Tiles of rows: their size, the layout of `saved`, and the way from and to batch tensors.
//
// A tile holds level l as (n_l, R): units in sorted order, R rows each, contiguous. `saved` is, for
// each tile, the pre-activations P_1 .. P_L and, for affine ops, the outputs O: (total, R). Those
// of an activated context layer come before them. Rows past the end of the batch are computed from
// zeros up to a whole vector; the vectors after that are zeros in `saved` and never computed.
#pragma once

#include "../common/blocked.h"
#include "autoregressive.h"

namespace fastflow {

struct TileShape {
  int64_t batch;
  int64_t rows;   // R, a multiple of 16
  int64_t count;  // tiles
  int64_t total;  // units in `saved`, all levels together

  explicit TileShape(const AutoregressiveArgs& args)
      : batch(args.batch), rows(tile_rows(args.batch)), total(args.context_units()) {
    if (args.affine) total += args.outputs();
    count = (batch + rows - 1) / rows;
    for (int64_t l = 0; l + 1 < args.layer_count; ++l) total += args.layers[l].rows;
  }

  // The same with as many rows to a tile as there may be: whole tiles of these make one of those.
  TileShape widened() const {
    TileShape shape = *this;
    shape.rows = std::min(kMostTileRows, round_up(batch, 16));
    shape.count = (batch + shape.rows - 1) / shape.rows;
    return shape;
  }
  int64_t live_rows(int64_t tile) const { return std::min(rows, batch - tile * rows); }
  template <class T>
  int64_t live_vectors(int64_t tile) const {
    return (live_rows(tile) + Vec<T>::lanes - 1) / Vec<T>::lanes;
  }
};

// tile[position[d] * R + row] = batch[row * stride + d] for d < n, zeros in rows live .. R - 1 up
// to a whole vector. `batch` points to the tile's first row.
template <class T>
void load_tile(const T* batch, int64_t stride, int64_t live, int64_t n, const int32_t* position,
               T* tile, int64_t R) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t r0 = 0; r0 < live; r0 += lanes)
    for (int64_t d = 0; d < n; d += lanes) {
      const int64_t count = std::min<int64_t>(lanes, n - d);
      Vec<T> block[lanes];
      const T* from = batch + r0 * stride + d;
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r)
        block[r] = r0 + r < live ? load_up_to(from + r * stride, count) : Vec<T>(T(0));
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        if (i < count) block[i].store(tile + position[d + i] * R + r0);
    }
}

// batch[row * stride + d] = tile[position[d] * R + row] for row < live, d < n.
template <class T>
void store_tile(const T* tile, int64_t R, const int32_t* position, int64_t live, int64_t n,
                T* batch, int64_t stride) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t r0 = 0; r0 < live; r0 += lanes)
    for (int64_t d = 0; d < n; d += lanes) {
      const int64_t count = std::min<int64_t>(lanes, n - d);
      Vec<T> block[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        block[i] = i < count ? Vec<T>::load(tile + position[d + i] * R + r0) : Vec<T>(T(0));
      transpose(block);
      T* to = batch + r0 * stride + d;
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r)
        if (r0 + r < live) store_up_to(block[r], to + r * stride, count);
    }
}

}  // namespace fastflow
