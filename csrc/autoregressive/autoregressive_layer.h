// A layer on a tile of rows, as the passes of both directions need it, and the context's layer.
#pragma once

#include "autoregressive_units.h"
#include "autoregressive_unsorted.h"

namespace fastflow {

// P = b + T [+ the level before the last] for some units of a tile; T is in P. Null pointers: what
// is missing.
template <class T>
void start_units(const T* bias, bool term, const T* skipped, int64_t units, int64_t R,
                 int64_t vectors, T* p) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t j = 0; j < units; ++j) {
    const Vec<T> b(bias ? bias[j] : T(0));
    for (int64_t r = j * R; r < j * R + vectors * lanes; r += lanes) {
      Vec<T> sum = b;
      if (term) sum += Vec<T>::load(p + r);
      if (skipped) sum += Vec<T>::load(skipped + r);
      sum.store(p + r);
    }
  }
}

// P = b + T [+ the level before the last] + W A, then A_next = act(P), block of units by block.
template <class T>
void forward_layer(const SortedLayer<T>& layer, Activation activation, const T* a, const T* skipped,
                   const TileShape& shape, int64_t tile, T* p, T* a_next) {
  const int64_t R = shape.rows, vectors = shape.live_vectors<T>(tile);
  if (layer.term)
    load_tile(layer.term + tile * R * layer.rows, layer.rows, shape.live_rows(tile), layer.rows,
              layer.position, p, R);
  const auto before = [&](int64_t j0, int64_t units) {
    prefetch(p + (j0 + units) * R, std::min<int64_t>(kUnits, layer.rows - j0 - units) * R);
    start_units(layer.bias ? layer.bias + j0 : nullptr, layer.term || layer.started,
                layer.skip ? skipped + j0 * R : nullptr, units, R, vectors, p + j0 * R);
  };
  const auto after = [&](int64_t j0, int64_t units) {
    if (!layer.linear) activate_units(activation, p + j0 * R, units, R, vectors, a_next + j0 * R);
  };
  const auto reads = [&](int64_t j) { return layer.reads(j); };
  if (layer.places) {
    unsorted_forward(layer, a, p, R, shape.live_rows(tile), before, after);
  } else if (shape.live_rows(tile) > kNarrowRows) {
    stair_product(layer.forward(), a, p, R, vectors, layer.rows, reads, before, after);
  } else {
    before(0, layer.rows);
    stair_product_rows(layer.forward(), a, p, R, shape.live_rows(tile), layer.rows, reads);
    after(0, layer.rows);
  }
}

// The context's part of P_1, V c + v or act of it, in `p`; where there is an activation, what it is
// of goes to `levels`. `values` has room for the context of the tile.
template <class T>
void forward_context(const AutoregressiveArgs& args, const SortedLayer<T>& layer,
                     const TileShape& shape, int64_t tile, T* levels, T* p, T* values) {
  const int64_t R = shape.rows, C = layer.columns;
  load_tile(static_cast<const T*>(args.context->values) + tile * R * C, C, shape.live_rows(tile), C,
            args.context->layer.column_order, values, R);
  forward_layer<T>(layer, args.activation, values, nullptr, shape, tile, levels, p);
}

template <class T>
struct ContextScratch;

// dX in `dx`, which has what reaches the level directly, from dP of the level that the first layer
// or the context's makes, and its rows of the batch.
template <class T>
void backward_input(const SortedLayer<T>& layer, const T* d, const int32_t* position, int64_t R,
                    int64_t live, T* dx, T* d_in) {
  const int64_t vectors = (live + Vec<T>::lanes - 1) / Vec<T>::lanes, n = layer.columns;
  if (layer.places)
    unsorted_backward(layer, d, dx, R, live, [](int64_t) {});
  else if (live <= kNarrowRows)
    narrow_transposed(layer.weight, n, {0, layer.rows}, {0, n}, layer.prefix, layer.start, d, dx, R,
                      live);
  else
    stair_product(layer.transposed(), d, dx, R, vectors, n,
                  [&](int64_t j) { return layer.read_by(j); });
  store_tile(dx, R, position, live, n, d_in, n);
}

// The context's part: its values in `a`, the cotangent of its pre-activations in `d` unless that is
// dP_1, and its gradient.
template <class T>
void backward_context(const AutoregressiveArgs& args, const SortedLayer<T>& layer,
                      const TileShape& shape, int64_t tile, const T* d_first, T* d, T* a) {
  using S = Scratch<ContextScratch<T>>;
  const ContextLayer& context = *args.context;
  const int64_t R = shape.rows, C = layer.columns, live = shape.live_rows(tile);
  const int32_t* position = context.layer.column_order;  // the identity
  load_tile(static_cast<const T*>(context.values) + tile * R * C, C, live, C, position, a, R);
  if (!layer.linear) {
    const T* saved = static_cast<const T*>(args.saved) + tile * R * shape.total;
    slope_units(args.activation, saved, d_first, layer.rows, R, shape.live_vectors<T>(tile), d);
    d_first = d;
  }
  if (!context.d_values) return;
  S scratch(S::template bytes<T>(C * R));
  T* dc = scratch.template take<T>(C * R);
  std::fill_n(dc, C * R, T(0));
  backward_input(layer, d_first, position, R, live, dc,
                 static_cast<T*>(context.d_values) + tile * R * C);
}

}  // namespace fastflow
