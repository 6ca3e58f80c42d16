// A tile: as many rows of the batch as a vector has lanes, what the potential's gradient and
// Hessian are there, and all that they were made of. Letters as in
// fastflow/reference/pcp_potential.py, layers counted from 0.
#pragma once

#include <vector>

#include "../autoregressive/autoregressive_activation.h"
#include "../common/parallel.h"
#include "pcp.h"
#include "pcp_lanes.h"

namespace fastflow {

// Hands out memory, or counts how much of it a first pass would take.
class Arena {
 public:
  explicit Arena(char* memory = nullptr) : memory_(memory) {}
  template <class V>
  V* take(int64_t count) {
    V* taken = memory_ ? reinterpret_cast<V*>(memory_ + used_) : nullptr;
    used_ += size_t(round_up(count * int64_t(sizeof(V)), 64));
    return taken;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// f(workspace) with a Workspace(args, arena) in Scratch memory.
template <class Workspace, class F>
void with_workspace(const PcpArgs& args, const F& f) {
  Arena count;
  Workspace measured(args, count);
  Scratch<Workspace> scratch(count.used());
  Arena arena(scratch.template take<char>(int64_t(count.used())));
  Workspace workspace(args, arena);
  f(workspace);
}

template <class T>
struct PcpLayer {
  using V = Vec<T>;
  int64_t units, below;      // H_k, H_{k-1}
  SharedMatrix<T> u, w;      // (H_k, D), (H_k, H_{k-1})
  V *offset, *scale, *gate;  // t, b, a
  V *value, *steep, *flat;   // s(P), sg(P), sg(-P)
  V *arriving, *leaving;     // l, d
  V *pulled, *pushed;        // W^T d, U^T d
  V *bend, *rate;            // h, c
  V* spread;                 // T, `stride` vectors to a unit
};

template <class T>
class PcpTile {
 public:
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;

  const PcpArgs& args;
  const int64_t D, K;
  const int64_t stride;  // an odd number of cache lines: units do not meet in a cache set
  int64_t row = 0, rows = 0;
  std::vector<PcpLayer<T>> layers;
  V *x, *slope, *shift, *curvature;
  V *y, *matrix, *reciprocals;  // (D), (D, D), (D)
  V *features, *units, *work;   // room for (D), (max H), (max H, stride)

  PcpTile(const PcpArgs& args, Arena& arena)
      : args(args), D(args.features), K(args.layers), stride(D | 1) {
    int64_t most = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t n = args.widths[k], below = k ? args.widths[k - 1] : 0;
      const auto data = [](const PcpTensor& tensor) { return static_cast<const T*>(tensor.data); };
      PcpLayer<T> layer{.units = n,
                        .below = below,
                        .u = {data(args.input(k)), n, D},
                        .w = {k ? data(args.weight(k)) : nullptr, n, below}};
      for (V** of_units : {&layer.offset, &layer.value, &layer.steep, &layer.flat, &layer.arriving,
                           &layer.leaving, &layer.bend})
        *of_units = take(arena, n);
      for (V** of_below : {&layer.gate, &layer.pulled, &layer.rate}) *of_below = take(arena, below);
      for (V** of_features : {&layer.scale, &layer.pushed}) *of_features = take(arena, D);
      layer.spread = take(arena, round_up(n, 4) * stride);
      layers.push_back(layer);
      most = std::max(most, n);
    }
    slope = take(arena, layers.back().units);
    for (V** of_features : {&x, &shift, &curvature, &y, &reciprocals, &features})
      *of_features = take(arena, D);
    matrix = take(arena, D * D);
    units = take(arena, most);
    work = take(arena, round_up(most, 4) * stride);
  }

  // Vectors, and room for the blocks in which rows are transposed.
  static V* take(Arena& arena, int64_t count) { return arena.take<V>(round_up(count, lanes)); }

  // The rows' terms. Lanes past the end of the batch get a curvature of 1, so that their Hessian is
  // positive definite; x and all cotangents are 0 there.
  void load_terms(int64_t tile) {
    row = tile * lanes;
    rows = std::min<int64_t>(lanes, args.batch - row);
    for (int64_t k = 0; k < K; ++k) {
      PcpLayer<T>& layer = layers[size_t(k)];
      load(args.offset(k), layer.offset);
      if (args.conditional) {
        load(args.scale(k), layer.scale);
        if (k) load(args.gate(k), layer.gate);
      } else {
        std::fill_n(layer.scale, D, V(T(1)));
        std::fill_n(layer.gate, layer.below, V(T(1)));
      }
    }
    load(args.slope(), slope);
    load(args.shift(), shift);
    load(args.curvature(), curvature);
    const auto there = first_lanes<T>(int(rows));
    for (int64_t d = 0; rows < lanes && d < D; ++d)
      curvature[d] = select(there, curvature[d], V(T(1)));
  }

  // to (D) = some rows of a (B, D) tensor, and back; 0 past the end of the batch.
  void load_rows(const void* tensor, V* to) const {
    transpose_in(static_cast<const T*>(tensor) + row * D, D, rows, D, scalars(to), lanes);
  }
  void store_rows(const V* from, void* tensor, int64_t n) const {
    transpose_out(scalars(from), lanes, n, static_cast<T*>(tensor) + row * n, n, rows);
  }
  V load_numbers(const void* tensor) const {
    return load_up_to(static_cast<const T*>(tensor) + row, rows);
  }
  void store_numbers(V from, void* tensor) const {
    store_up_to(from, static_cast<T*>(tensor) + row, rows);
  }

  // P_k and what follows of it, at `at`; the value of the last layer only if `top`.
  void activate(const V* at, bool top) {
    for (int64_t k = 0; k < K; ++k) {
      PcpLayer<T>& layer = layers[size_t(k)];
      std::copy_n(layer.offset, layer.units, layer.value);
      if (k) {
        const V* value = layers[size_t(k - 1)].value;
        for (int64_t i = 0; i < layer.below; ++i) units[i] = layer.gate[i] * value[i];
        add_product(layer.w, units, layer.value);
      }
      for (int64_t d = 0; d < D; ++d) features[d] = layer.scale[d] * at[d];
      add_product(layer.u, features, layer.value);
      for (int64_t j = 0; j < layer.units; ++j) {
        const V p = layer.value[j];
        const auto slopes = sigmoid(p);
        layer.steep[j] = slopes.s;
        layer.flat[j] = slopes.complement;
        if (top || k + 1 < K) layer.value[j] = softplus(p, slopes.e);
      }
    }
  }

  // y, the gradient of the potential at `at`, where `activate` has been.
  void gradient(const V* at) {
    for (int64_t d = 0; d < D; ++d) y[d] = shift[d] + curvature[d] * at[d];
    const V* down = slope;
    for (int64_t k = K - 1; k >= 0; --k) {
      PcpLayer<T>& layer = layers[size_t(k)];
      for (int64_t j = 0; j < layer.units; ++j) {
        layer.arriving[j] = down[j];
        layer.leaving[j] = down[j] * layer.steep[j];
      }
      std::fill_n(layer.pushed, D, V(T(0)));
      add_product(layer.u.turned(), layer.leaving, layer.pushed);
      for (int64_t d = 0; d < D; ++d) y[d] += layer.scale[d] * layer.pushed[d];
      if (!k) break;
      std::fill_n(layer.pulled, layer.below, V(T(0)));
      add_product(layer.w.turned(), layer.leaving, layer.pulled);
      for (int64_t i = 0; i < layer.below; ++i) units[i] = layer.gate[i] * layer.pulled[i];
      down = units;
    }
  }

  // The lower triangle of H, where `gradient` has been.
  void hessian() {
    for (int64_t a = 0; a < D; ++a)
      for (int64_t b = 0; b <= a; ++b) matrix[a * D + b] = a == b ? curvature[a] : V(T(0));
    for (int64_t k = 0; k < K; ++k) {
      PcpLayer<T>& layer = layers[size_t(k)];
      for (int64_t j = 0; j < layer.units; ++j) {
        layer.bend[j] = layer.leaving[j] * layer.flat[j];
        for (int64_t d = 0; d < D; ++d)
          layer.spread[j * stride + d] = layer.scale[d] * layer.u.data[j * D + d];
      }
      if (k) {
        const PcpLayer<T>& before = layers[size_t(k - 1)];
        for (int64_t i = 0; i < layer.below; ++i) layer.rate[i] = layer.gate[i] * before.steep[i];
        set_gated(layer, before);
        add_product(layer.w, work, stride, layer.spread, stride, D);
      }
      const V *spread = layer.spread, *bend = layer.bend;
      lane_products<T>(
          D, D, layer.units, true,
          [=, this](int64_t j, int64_t a) { return bend[j] * spread[j * stride + a]; },
          [=, this](int64_t j, int64_t b) { return spread[j * stride + b]; },
          [=, this](int64_t a, int64_t b, V sum) { matrix[a * D + b] += sum; });
    }
  }

  // work = c_k T_{k-1}.
  void set_gated(const PcpLayer<T>& layer, const PcpLayer<T>& before) {
    for (int64_t i = 0; i < layer.below; ++i)
      for (int64_t d = 0; d < D; ++d)
        work[i * stride + d] = layer.rate[i] * before.spread[i * stride + d];
  }

  static T* scalars(V* vectors) { return reinterpret_cast<T*>(vectors); }
  static const T* scalars(const V* vectors) { return reinterpret_cast<const T*>(vectors); }

 private:
  void load(const PcpTensor& term, V* to) const {
    const T* from = static_cast<const T*>(term.data);
    if (term.shared)
      std::copy_n(from, term.size, to);
    else
      transpose_in(from + row * term.stride, term.stride, rows, term.size, scalars(to), lanes);
  }
};

// Cycles of the Hessian of a tile, roughly.
inline int64_t tile_cycles(const PcpArgs& args) {
  int64_t sum = 0;
  for (int64_t k = 0; k < args.layers; ++k) {
    const int64_t below = k ? args.widths[k - 1] : 0;
    sum += args.widths[k] * (args.features * (below + args.features) + 3 * below + 100);
  }
  return sum;
}

template <class T>
int64_t tile_count(const PcpArgs& args) {
  return (args.batch + Vec<T>::lanes - 1) / Vec<T>::lanes;
}

}  // namespace fastflow
