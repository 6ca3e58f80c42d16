// Gradients of weights and biases from the cotangents of the pre-activations and the activations of
// many tiles. The inverse's backward ends with it, too.
#pragma once

#include "autoregressive_network.h"

namespace fastflow {

template <class T>
int64_t cotangent_units(const Network<T>& network) {
  int64_t sum = 0;
  for (int64_t l = 0; l < network.layer_count; ++l) sum += network.layers[l].rows;
  return sum;
}
// Likewise, and those of an activated context layer, whose cotangents follow.
template <class T>
int64_t all_cotangent_units(const Network<T>& network) {
  const SortedLayer<T>* context = network.context;
  return cotangent_units(network) + (context && !context->linear ? context->rows : 0);
}
template <class T>
int64_t activation_units(const Network<T>& network) {
  int64_t sum = 0;
  for (int64_t l = 0; l < network.layer_count; ++l) sum += network.layers[l].columns;
  return sum;
}
template <class T>
int64_t all_activation_units(const Network<T>& network) {
  return activation_units(network) + (network.context ? network.context->columns : 0);
}

// What the products over a group of consecutive tiles need of them: the cotangents dP_1 .. dP_{L+1}
// of each tile, level after level as (n_l, R), and the activations A_0 .. A_L of all, in panels, in
// the order of the weights' columns where these are used as they lie. A context is one more level
// of both, the last.
template <class T>
struct TileGroup {
  const Network<T>& network;
  int64_t R;
  int64_t capacity;  // rows of the batch that it has room for
  int64_t rows;      // and that it holds
  bool first;        // of the batch: its sums begin at zero
  T* all_cotangents;
  T* panels;

  // How many rows to a group: a few tiles for every thread, of which the cache still holds much
  // when the products are taken, within a bound on all of them together. Sums run over multiples of
  // kOuterRows, whatever the group.
  static int64_t group_rows(const Network<T>& network, const TileShape& shape) {
    static_assert(kOuterRows % kMostTileRows == 0);
    constexpr int64_t tiles_per_thread = 4, most_bytes = int64_t(32) << 20;
    const int64_t units = all_cotangent_units(network) + all_activation_units(network);
    const int64_t rows = tiles_per_thread * torch::stable::get_num_threads() * shape.rows;
    const int64_t fit = most_bytes / (units * int64_t(sizeof(T)));
    const int64_t pieces = std::max<int64_t>(std::min(rows, fit) / kOuterRows, 1);
    return std::min(shape.count * shape.rows, pieces * kOuterRows);
  }
  static int64_t panel_units(const Network<T>& network) {
    int64_t sum = 0;
    for (int64_t l = 0; l < network.layer_count; ++l)
      sum += round_up(network.layers[l].columns, kPanel<T>);
    return sum + (network.context ? round_up(network.context->columns, kPanel<T>) : 0);
  }

  T* cotangents(int64_t tile) const {
    return all_cotangents + tile * R * all_cotangent_units(network);
  }
  // Takes over A_0 .. A_L of a tile, level after level as (n_l, R).
  void set_activations(int64_t tile, const T* a) const {
    T* to = panels + tile * R * kPanel<T>;
    const auto set = [&](int64_t columns, const int32_t* place) {
      tile_to_panels(a, R, std::min(R, rows - tile * R), columns, place, to, capacity);
      a += columns * R;
      to += round_up(columns, kPanel<T>) * capacity;
    };
    for (int64_t l = 0; l < network.layer_count; ++l)
      set(network.layers[l].columns, network.layers[l].place);
    if (network.context) set(network.context->columns, nullptr);
  }
};

// Rows first .. last - 1 (in sorted order) of the gradient of weights in any order. All entries are
// computed, and those of masked weights are replaced by zero.
template <class T>
void unsorted_outer_rows(T* dweight, const SortedLayer<T>& layer, const TileGroup<T>& group,
                         const T* d, int64_t d_stride, const T* panels, int64_t first,
                         int64_t last) {
  for (int64_t row = 0; row < group.rows; row += kOuterRows) {
    const bool begin = group.first && row == 0;
    stair_outer(d + row / group.R * d_stride, d_stride, group.R, panels + row * kPanel<T>,
                group.capacity, std::min(kOuterRows, group.rows - row), layer.all, first, last,
                [&](int64_t o, int64_t i, int64_t n, Vec<T> sums) {
                  const auto seen = Vec<T>::load(layer.places + i) < Vec<T>(T(layer.prefix[o]));
                  const Vec<T> more = select(seen, sums, Vec<T>(T(0)));
                  T* at = dweight + layer.order[o] * layer.columns + i;
                  store_up_to(begin ? more : load_up_to(at, n) + more, at, n);
                });
  }
}

// Rows first .. last - 1 (in sorted order) of a layer's gradients.
template <class T>
void outer_rows(const MaskedLayer& to, const SortedLayer<T>& layer, const TileGroup<T>& group,
                const T* d, int64_t d_stride, const T* panels, int64_t first, int64_t last) {
  T* dweight = static_cast<T*>(to.dweight);
  if (layer.places) {
    unsorted_outer_rows(dweight, layer, group, d, d_stride, panels, first, last);
  } else {
    if (group.first)
      for (int64_t k = first; k < last; ++k)
        std::fill_n(dweight + to.order[k] * layer.columns, layer.columns, T(0));
    stair_outer(d, d_stride, group.R, panels, group.capacity, group.rows, layer.prefix, first, last,
                [&](int64_t o, int64_t i, int64_t n, Vec<T> sums) {
                  T* row = dweight + to.order[o] * layer.columns;
                  if (layer.columns_in_order) {
                    store_up_to(load_up_to(row + i, n) + sums, row + i, n);
                    return;
                  }
                  T each[Vec<T>::lanes];
                  sums.store(each);
                  for (int64_t j = 0; j < n; ++j) row[to.column_order[i + j]] += each[j];
                });
  }
  T* dbias = static_cast<T*>(to.dbias);
  for (int64_t k = first; dbias && k < last; ++k) {
    T& at = dbias[to.order[k]];
    if (group.first) at = T(0);
    for (int64_t row = 0; row < group.rows; row += kOuterRows) {
      Vec<T> total(T(0));
      const T* rows = d + row / group.R * d_stride + k * group.R;
      for (int64_t left = std::min(kOuterRows, group.rows - row); left > 0;
           left -= group.R, rows += d_stride)
        for (int64_t r = 0; r < std::min(left, group.R); r += Vec<T>::lanes)
          total += load_up_to(rows + r, left - r);
      at += sum(total);
    }
  }
}

// dW and db of all layers. Blocks of rows are spread over the threads; the order in which a sum
// runs over the batch depends on nothing but the batch.
template <class T>
void outer_products(const AutoregressiveArgs& args, const TileGroup<T>& group) {
  constexpr int64_t block = 4 * kUnits;
  const Network<T>& network = group.network;
  const auto blocks_of = [](const SortedLayer<T>& layer) {
    return (layer.rows + block - 1) / block;
  };
  int64_t blocks = network.context ? blocks_of(*network.context) : 0;
  for (int64_t l = 0; l < network.layer_count; ++l) blocks += blocks_of(network.layers[l]);
  const int64_t d_stride = all_cotangent_units(network) * group.R;
  parallel_tasks(blocks, network.cycles(group.rows) > kThreadCycles, [&](int64_t task) {
    const T *d = group.all_cotangents, *panels = group.panels;
    const auto run = [&](const MaskedLayer& to, const SortedLayer<T>& layer) {
      const int64_t first = (blocks_of(layer) - 1 - task) * block;  // the longest rows first
      outer_rows(to, layer, group, d, d_stride, panels, first, std::min(first + block, layer.rows));
    };
    for (int64_t l = 0; l < network.layer_count; ++l) {
      const SortedLayer<T>& layer = network.layers[l];
      if (task < blocks_of(layer)) return run(args.layers[l], layer);
      task -= blocks_of(layer);
      d += layer.rows * group.R;
      panels += round_up(layer.columns, kPanel<T>) * group.capacity;
    }
    if (network.context->linear) d = group.all_cotangents;  // the first level's
    run(args.context->layer, *network.context);
  });
}

// Rows of the batch from which on packing transposed weights pays.
inline constexpr int64_t kPackedRows = 64;

template <class T>
struct ActivationScratch;
template <class T>
struct GroupScratch;

// Backward of either direction: backward_tile(tile, cotangents, activations), which also writes
// what has rows, for every tile; then the gradients of the parameters.
template <class T, class BackwardTile>
void backward_tiles(const AutoregressiveArgs& args, const Network<T>& network,
                    const TileShape& shape, const BackwardTile& backward_tile) {
  const int64_t R = shape.rows, a_size = all_activation_units(network) * R;
  const int64_t group_rows = TileGroup<T>::group_rows(network, shape);
  const int64_t d_size = all_cotangent_units(network) * group_rows;
  const int64_t panel_size = TileGroup<T>::panel_units(network) * group_rows;
  using S = Scratch<GroupScratch<T>>;
  S scratch(S::template bytes<T>(d_size) + S::template bytes<T>(panel_size));
  TileGroup<T> group{network,
                     R,
                     group_rows,
                     0,
                     true,
                     scratch.template take<T>(d_size),
                     scratch.template take<T>(panel_size)};
  for (int64_t row = 0; row < args.batch; row += group_rows) {
    group.rows = std::min(group_rows, args.batch - row);
    group.first = row == 0;
    // where weights are used unsorted, the threads share a tile
    const bool share = network.cycles(group.rows) > kThreadCycles && !network.unsorted;
    parallel_tasks((group.rows + R - 1) / R, share, [&](int64_t i) {
      using A = Scratch<ActivationScratch<T>>;
      A memory(A::template bytes<T>(a_size));
      T* activations = memory.template take<T>(a_size);
      backward_tile(row / R + i, group.cotangents(i), activations);
      if (args.layers[0].dweight) group.set_activations(i, activations);
    });
    if (args.layers[0].dweight) outer_products(args, group);
  }
}

}  // namespace fastflow
