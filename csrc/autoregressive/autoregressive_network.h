// The network of a call, in sorted order: what does not depend on a row.
#pragma once

#include <numeric>

#include "../common/parallel.h"
#include "../common/staircase_unsorted.h"
#include "autoregressive_tile.h"

namespace fastflow {

// What a pass wants of the weights: in sorted order; the transposes in panels, too (backward, with
// rows enough to make up for the packing); or as they lie, for few rows.
enum class Weights { sorted, packed, unsorted };

// Layer l = 0 .. L in sorted order. W is the caller's tensor where both orders are the identity, or
// where the network leaves the weights as they lie; else a copy whose masked entries are zero.
// Masked entries may be read; they enter no sum.
template <class T>
struct SortedLayer {
  int64_t rows;             // n_{l+1}
  int64_t columns;          // n_l
  const T* weight;          // (rows, columns)
  const T* bias;            // (rows) or null
  const T* term;            // (B, rows) or null, NOT sorted: see load_tile
  const int32_t* order;     // (rows): position -> unit
  const int32_t* position;  // (rows): unit -> position
  const int32_t* prefix;    // (rows): unit k reads columns 0 .. prefix[k] - 1
  const int32_t* start;     // (columns): column j is read by rows start[j] .. rows - 1
  bool identity;            // order is 0, 1, ..., rows - 1
  bool columns_in_order;    // likewise of level l
  const T* places;          // null, or W is as it lies: the places of its columns, see Unsorted
  const int32_t* place;     // (columns): likewise
  const int32_t* all;       // (rows): `columns` for each, likewise
  bool started;             // the terms are where the pre-activations go
  bool skip;                // the level before the last is added to it (residual)
  bool linear;              // no activation follows

  // As a matrix of the units of level l + 1 by those of level l, and the other way round.
  Strided<T> forward() const { return {weight, columns, 1}; }
  Strided<T> transposed() const { return {weight, 1, columns}; }
  Packed<T> packed;  // transposed(), if the backward asked for it
  Unsorted<T> unsorted() const {
    return {weight, rows, columns, order, prefix, start, place, places};
  }
  // What unit k of level l + 1 reads of level l, and what unit j of level l is read by.
  Range reads(int64_t k) const { return {0, prefix[k]}; }
  Range read_by(int64_t j) const { return {start[j], rows}; }
};

template <class T>
class Network {
 public:
  int64_t layer_count;            // L + 1
  int64_t widest;                 // max of n_0 .. n_{L+1}
  bool unsorted;                  // the weights are used as they lie
  const SortedLayer<T>* layers;   // (L + 1)
  const SortedLayer<T>* context;  // null if there is none
  const int32_t* order;           // (D), of the features
  const int32_t* position;        // (D)

  explicit Network(const AutoregressiveArgs& args, Weights weights = Weights::sorted)
      : layer_count(args.layer_count),
        unsorted(weights == Weights::unsorted),
        memory_(bytes(args, weights)) {
    auto* sorted = memory_.template take<SortedLayer<T>>(layer_count);
    layers = sorted;
    order = args.layers[0].column_order;
    position = invert(order, args.features);
    bool columns_in_order = is_identity(order, args.features);
    widest = args.features;
    for (int64_t l = 0; l < layer_count; ++l) {
      SortedLayer<T>& to = sorted[l];
      to = sort(args.layers[l], columns_in_order, weights);
      if (weights == Weights::unsorted) leave(to, l ? sorted[l - 1].position : position);
      const bool last = l + 1 == layer_count;
      to.started = l == 0 && args.context;
      to.skip = args.residual && !last && l >= 2 && l % 2 == 0;
      to.linear = last || (args.residual && l + 2 == layer_count);
      columns_in_order = to.identity;
      widest = std::max(widest, to.rows);
    }
    context = nullptr;
    if (args.context) {
      auto* layer = memory_.template take<SortedLayer<T>>(1);
      *layer = sort(args.context->layer, true, Weights::sorted);
      layer->linear = !args.context->activated;
      context = layer;
    }
  }

  // Whether a pass over the batch is better off with the weights as they lie. Where most of them
  // are out of order, to copy them takes as long as the products with all rows of a tile, and with
  // more rows the further the copies are from what the caches hold.
  static bool leaves(const AutoregressiveArgs& args) {
    constexpr int64_t bytes_per_row = int64_t(1) << 16, most_rows = 512;
    if (args.batch > most_rows) return false;
    bool columns_in_order = is_identity(args.layers[0].column_order, args.features);
    int64_t copied = 0, all = 0;
    for (int64_t l = 0; l < args.layer_count; ++l) {
      const MaskedLayer& layer = args.layers[l];
      all += layer.rows * layer.columns;
      if (copies(layer, columns_in_order, Weights::sorted)) copied += layer.rows * layer.columns;
      columns_in_order = is_identity(layer.order, layer.rows);
    }
    const int64_t few = std::max(kMostTileRows, all * int64_t(sizeof(T)) / bytes_per_row);
    return args.batch <= few && 2 * copied > all;
  }

  // Of a pass over the batch, roughly, to decide whether it is worth a thread.
  int64_t cycles(int64_t batch) const {
    int64_t sum = 0;
    for (int64_t l = 0; l < layer_count; ++l) sum += layers[l].rows * (layers[l].columns / 2 + 30);
    if (context) sum += context->rows * (context->columns + (context->linear ? 0 : 30));
    return sum * batch / Vec<T>::lanes;
  }

 private:
  using Memory = Scratch<Network>;
  Memory memory_;

  // But for what its place among the layers says.
  SortedLayer<T> sort(const MaskedLayer& from, bool columns_in_order, Weights weights) {
    SortedLayer<T> to{};
    to.rows = from.rows;
    to.columns = from.columns;
    to.order = from.order;
    to.position = invert(from.order, from.rows);
    to.prefix = from.prefix;
    int32_t* start = memory_.template take<int32_t>(from.columns);
    for (int64_t j = 0, k = 0; j < from.columns; ++j) {
      while (k < from.rows && from.prefix[k] <= j) ++k;
      start[j] = int32_t(k);
    }
    to.start = start;
    to.identity = is_identity(from.order, from.rows);
    to.columns_in_order = columns_in_order;
    to.weight = static_cast<const T*>(from.weight);
    if (copies(from, columns_in_order, weights)) to.weight = gather(from);
    to.packed = {packs(from, weights) ? pack(to) : nullptr, from.rows};
    to.bias = static_cast<const T*>(from.bias);
    if (to.bias && !to.identity) {
      T* bias = memory_.template take<T>(from.rows);
      for (int64_t k = 0; k < from.rows; ++k) bias[k] = to.bias[from.order[k]];
      to.bias = bias;
    }
    to.term = static_cast<const T*>(from.term);
    return to;
  }
  void leave(SortedLayer<T>& layer, const int32_t* place) {
    T* places = memory_.template take<T>(round_up(layer.columns, Vec<T>::lanes));
    for (int64_t i = 0; i < round_up(layer.columns, Vec<T>::lanes); ++i)
      places[i] = T(i < layer.columns ? place[i] : layer.columns);
    int32_t* all = memory_.template take<int32_t>(layer.rows);
    std::fill_n(all, layer.rows, int32_t(layer.columns));
    layer.places = places;
    layer.place = place;
    layer.all = all;
  }
  static bool copies(const MaskedLayer& layer, bool columns_in_order, Weights weights) {
    const bool in_order = columns_in_order && is_identity(layer.order, layer.rows);
    return weights != Weights::unsorted && !in_order;
  }
  static bool is_identity(const int32_t* order, int64_t n) {
    for (int64_t k = 0; k < n; ++k)
      if (order[k] != k) return false;
    return true;
  }
  const int32_t* invert(const int32_t* order, int64_t n) {
    int32_t* position = memory_.template take<int32_t>(n);
    for (int64_t k = 0; k < n; ++k) position[order[k]] = int32_t(k);
    return position;
  }
  const T* gather(const MaskedLayer& from) {
    T* weight = memory_.template take<T>(from.rows * from.columns);
    const T* source = static_cast<const T*>(from.weight);
    const int64_t grain = std::max<int64_t>(1, kThreadCycles / (2 * from.columns));
    parallel_for(from.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const T* row = source + from.order[k] * from.columns;
        T* to = weight + k * from.columns;
        for (int64_t j = 0; j < from.prefix[k]; ++j) to[j] = row[from.column_order[j]];
        std::fill(to + from.prefix[k], to + from.columns, T(0));
      }
    });
    return weight;
  }
  // Whether a column of W meets so few cache sets, or so many pages, that reading it is slow.
  static bool packs(const MaskedLayer& layer, Weights weights) {
    return weights == Weights::packed && layer.columns >= 256;
  }
  const T* pack(const SortedLayer<T>& layer) {
    const int64_t columns = layer.columns, rows = layer.rows;
    T* packed = memory_.template take<T>(round_up(columns, kUnits) * rows);
    constexpr int64_t depth = 16;
    const int64_t pieces = (rows + depth - 1) / depth;
    const int64_t grain = std::max<int64_t>(1, kThreadCycles / (depth * columns));
    parallel_for(pieces, grain, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * depth, rows);
      for (int64_t k0 = begin * depth; k0 < last; k0 += depth)
        for (int64_t j0 = 0; j0 < columns; j0 += kUnits)
          for (int64_t k = std::max<int64_t>(k0, layer.start[j0]); k < std::min(k0 + depth, last);
               ++k) {
            const T* from = layer.weight + k * columns + j0;
            T* to = packed + j0 * rows + k * kUnits;
            if (j0 + kUnits <= columns)
              std::memcpy(to, from, kUnits * sizeof(T));
            else
              std::copy_n(from, columns - j0, to);
          }
    });
    return packed;
  }
  static size_t bytes(const AutoregressiveArgs& args, Weights weights) {
    size_t sum = Memory::template bytes<SortedLayer<T>>(args.layer_count) +
                 Memory::template bytes<int32_t>(args.features);
    bool columns_in_order = is_identity(args.layers[0].column_order, args.features);
    for (int64_t l = 0; l < args.layer_count; ++l) {
      sum += bytes(args.layers[l], columns_in_order, weights);
      columns_in_order = is_identity(args.layers[l].order, args.layers[l].rows);
    }
    if (args.context)
      sum += Memory::template bytes<SortedLayer<T>>(1) +
             bytes(args.context->layer, true, Weights::sorted);
    return sum;
  }
  static size_t bytes(const MaskedLayer& layer, bool columns_in_order, Weights weights) {
    size_t sum = Memory::template bytes<int32_t>(layer.rows) +
                 Memory::template bytes<int32_t>(layer.columns);
    if (!is_identity(layer.order, layer.rows)) sum += Memory::template bytes<T>(layer.rows);
    if (copies(layer, columns_in_order, weights))
      sum += Memory::template bytes<T>(layer.rows * layer.columns);
    if (weights == Weights::unsorted)
      sum += Memory::template bytes<T>(round_up(layer.columns, Vec<T>::lanes)) +
             Memory::template bytes<int32_t>(layer.rows);
    if (packs(layer, weights))
      sum += Memory::template bytes<T>(layer.rows * round_up(layer.columns, kUnits));
    return sum;
  }
};

}  // namespace fastflow
