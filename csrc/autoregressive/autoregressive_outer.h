// Gradients of weights and biases from the cotangents of the pre-activations and the activations of
// many tiles. The inverse's backward ends with it, too.
#pragma once

#include "autoregressive_network.h"

namespace fastflow {

// A group of consecutive tiles. For each tile `cotangents` has dP_1 .. dP_{L+1} and `activations`
// A_0 .. A_L, level after level as (n_l, R). Rows past the end of the batch are zeros in both.
template <class T>
struct TileGroup {
  const T* cotangents;
  const T* activations;
  int64_t rows;     // R
  int64_t vectors;  // of all its tiles together
  bool first;       // of the batch: its sums are stored, those of later groups added
};

template <class T>
int64_t cotangent_units(const Network<T>& network) {
  int64_t sum = 0;
  for (int64_t l = 0; l < network.layer_count; ++l) sum += network.layers[l].rows;
  return sum;
}
template <class T>
int64_t activation_units(const Network<T>& network) {
  int64_t sum = 0;
  for (int64_t l = 0; l < network.layer_count; ++l) sum += network.layers[l].columns;
  return sum;
}

// Zeros in rows live .. of the last vector of a tile that has fewer rows than its vectors.
template <class T>
void clear_padding(T* tile, int64_t units, int64_t R, int64_t live) {
  const int64_t end = round_up(live, Vec<T>::lanes);
  for (int64_t j = 0; live < end && j < units; ++j)
    std::fill(tile + j * R + live, tile + j * R + end, T(0));
}

// Rows of one layer's weight gradient, first .. last - 1 in sorted order.
template <class T>
void outer_rows(const MaskedLayer& to, const SortedLayer<T>& layer, Tiles<T> d, Tiles<T> a,
                const TileGroup<T>& group, int64_t first, int64_t last) {
  constexpr int lanes = Vec<T>::lanes;
  T* dweight = static_cast<T*>(to.dweight);
  const int32_t *order = to.order, *column_order = to.column_order;
  if (group.first)
    for (int64_t k = first; k < last; ++k)
      std::fill_n(dweight + order[k] * layer.columns, layer.columns, T(0));
  stair_outer(d, a, group.rows, group.vectors, layer.prefix, first, last,
              [&](int64_t o, int64_t i, T sum) {
                dweight[order[o] * layer.columns + column_order[i]] += sum;
              });
  T* dbias = static_cast<T*>(to.dbias);
  for (int64_t k = first; dbias && k < last; ++k) {
    Vec<T> total(T(0));
    const int64_t per_tile = group.rows / lanes;
    for (int64_t v = 0; v < group.vectors; ++v)
      total +=
          Vec<T>::load(d.data + v / per_tile * d.stride + k * group.rows + v % per_tile * lanes);
    const T before = group.first ? T(0) : dbias[order[k]];
    dbias[order[k]] = before + sum(total);
  }
}

// dW and db of all layers. Blocks of rows are spread over the threads; the order in which a sum
// runs over the batch depends on nothing but the batch.
template <class T>
void outer_products(const AutoregressiveArgs& args, const Network<T>& network,
                    const TileGroup<T>& group) {
  constexpr int64_t block = 48;
  int64_t blocks = 0, cycles = 0;
  for (int64_t l = 0; l < network.layer_count; ++l) {
    const SortedLayer<T>& layer = network.layers[l];
    blocks += (layer.rows + block - 1) / block;
    cycles += layer.rows * layer.columns / 2 * group.vectors;
  }
  const int64_t d_stride = cotangent_units(network) * group.rows;
  const int64_t a_stride = activation_units(network) * group.rows;
  parallel_tasks(blocks, cycles > kThreadCycles, [&](int64_t task) {
    const T *d = group.cotangents, *a = group.activations;
    for (int64_t l = 0; l < network.layer_count; ++l) {
      const SortedLayer<T>& layer = network.layers[l];
      const int64_t n = (layer.rows + block - 1) / block;
      if (task < n) {
        const int64_t first = (n - 1 - task) * block;  // the longest rows first
        outer_rows(args.layers[l], layer, Tiles<T>{d, d_stride}, Tiles<T>{a, a_stride}, group,
                   first, std::min(first + block, layer.rows));
        return;
      }
      task -= n;
      d += layer.rows * group.rows;
      a += layer.columns * group.rows;
    }
  });
}

}  // namespace fastflow
