// Layers whose weights are used where they lie, in any order: one wide tile after the other, and
// all threads share the units of a level, one level after the other.
#pragma once

#include "../common/staircase_unsorted.h"
#include "autoregressive_network.h"

namespace fastflow {

template <class T>
struct PanelScratch;

// Whether a product with the weights of a layer is worth threads: every weight is read, which costs
// more than the arithmetic of a few rows.
template <class T>
bool worth_threads(const SortedLayer<T>& layer, int64_t live) {
  const int64_t vectors = (live + Vec<T>::lanes - 1) / Vec<T>::lanes;
  return layer.rows * layer.columns / 2 * (1 + vectors) > 2 * kThreadCycles;
}

// P += W A for all units of a layer. before(j, n) and after(j, n) are called around the work on
// units j .. j + n - 1, by whichever thread does it.
template <class T, class Before, class After>
void unsorted_forward(const SortedLayer<T>& layer, const T* a, T* p, int64_t R, int64_t live,
                      const Before& before, const After& after) {
  const Unsorted<T> w = layer.unsorted();
  const int64_t tasks = (layer.rows + kPanelUnits<T> - 1) / kPanelUnits<T>;
  parallel_tasks(tasks, worth_threads(layer, live), [&](int64_t task) {
    using S = Scratch<PanelScratch<T>>;
    S scratch(S::template bytes<T>(panel_size(w)));
    const int64_t first = (tasks - 1 - task) * kPanelUnits<T>;  // the longest rows first
    const int64_t count = std::min(kPanelUnits<T>, layer.rows - first);
    before(first, count);
    unsorted_product(w, first, count, a, p + first * R, R, live,
                     scratch.template take<T>(panel_size(w)));
    after(first, count);
  });
}

// dA += W^T dP for all units of the level that a layer reads; after(j) is called for each of them
// when its sum is there.
template <class T, class After>
void unsorted_backward(const SortedLayer<T>& layer, const T* d_out, T* d, int64_t R, int64_t live,
                       const After& after) {
  const Unsorted<T> w = layer.unsorted();
  const int64_t strip = strip_columns<T>(live), tasks = (layer.columns + strip - 1) / strip;
  parallel_tasks(tasks, worth_threads(layer, live), [&](int64_t task) {
    using S = Scratch<PanelScratch<T>>;
    const int64_t panel = live > kNarrowRows ? transposed_panel_size(w) : 0;
    S scratch(S::template bytes<T>(panel) + S::template bytes<T>(kPanelUnits<T> * R));
    T* memory = scratch.template take<T>(panel);
    const int64_t first = task * strip;
    unsorted_transposed(w, first, d_out, d, R, live, memory,
                        scratch.template take<T>(kPanelUnits<T> * R));
    for (int64_t i = first; i < std::min(first + strip, layer.columns); ++i) after(w.place[i]);
  });
}

// Between `saved`, whose tiles are those of `shape`, and the same in wider tiles: copy(p, q) for
// the rows of a tile and a unit.
template <class Saved, class Wide, class Copy>
void for_tiles(const TileShape& shape, const TileShape& wide, Saved* saved, Wide* widened,
               const Copy& copy) {
  parallel_for(shape.total, kThreadCycles / round_up(shape.batch, 16),
               [&](int64_t begin, int64_t end) {
                 for (int64_t tile = 0; tile < shape.count; ++tile) {
                   const int64_t row = tile * shape.rows, within = row % wide.rows;
                   for (int64_t j = begin; j < end; ++j)
                     copy(saved + row * shape.total + j * shape.rows,
                          widened + (row - within) * shape.total + j * wide.rows + within);
                 }
               });
}

}  // namespace fastflow
