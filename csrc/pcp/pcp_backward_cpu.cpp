// The derivatives of either direction, a tile of rows at a time, as fastflow/reference/
// pcp_backward.py does it. Cotangents are called d_ and the name of what they belong to.
//
// Nothing is kept by the forward pass: a tile's Hessian is computed again while its parts are in
// the cache, which takes less time than to fetch them.
#include "pcp_sums.h"
#include "pcp_tile.h"

namespace fastflow {
namespace {

template <class T>
struct LayerCotangents {
  using V = Vec<T>;
  V *bend, *steep, *p, *arriving;     // (H_k); steep: of sg(P_k), through what P_k does otherwise
  V *rate, *pulled, *through_weight;  // (H_{k-1}); W_k^T dP_k
  V *scale, *through_input;           // (D); what the Hessian gives to b_k, U_k^T dP_k
};

template <class T>
class TileCotangents {
 public:
  using V = Vec<T>;

  TileCotangents(const PcpArgs& args, Arena& arena)
      : args_(args), tile_(args, arena), D_(args.features), K_(args.layers) {
    int64_t most = 0;
    for (const PcpLayer<T>& layer : tile_.layers) {
      LayerCotangents<T> d;
      for (V** of_units : {&d.bend, &d.steep, &d.p, &d.arriving})
        *of_units = tile_.take(arena, layer.units);
      for (V** of_below : {&d.rate, &d.pulled, &d.through_weight})
        *of_below = tile_.take(arena, layer.below);
      for (V** of_features : {&d.scale, &d.through_input}) *of_features = tile_.take(arena, D_);
      layers_.push_back(d);
      most = std::max(most, round_up(layer.units, 4));
    }
    for (V** of_features : {&d_y_, &d_x_}) *of_features = tile_.take(arena, D_);
    for (V** square : {&d_matrix_, &square_}) *square = tile_.take(arena, D_ * D_);
    for (V** spread : {&d_spread_, &from_above_}) *spread = tile_.take(arena, most * tile_.stride);
    for (V** pairs : {&pairs_, &pairs_below_}) *pairs = tile_.take(arena, most * 2);
    term_ = tile_.take(arena, std::max(most, D_));
  }

  // The cotangents of the rows of a tile; adds to `sums` what they give to all rows' tensors.
  void run(int64_t number, const SharedSums<T>& shared, T* sums) {
    shared_ = &shared;
    sums_ = sums;
    tile_.load_terms(number);
    tile_.load_rows(args_.x, tile_.x);
    tile_.activate(tile_.x, false);
    tile_.gradient(tile_.x);
    tile_.hessian();
    factorise(D_, tile_.matrix, tile_.reciprocals);
    V d_ladj = tile_.load_numbers(args_.dladj);
    if (args_.inverse) d_ladj = -d_ladj;
    invert(D_, tile_.matrix, tile_.reciprocals, square_, d_matrix_);
    const auto nothing = abs(d_ladj) <= T(0);  // of which no NaN must be made
    for (int64_t i = 0; i < D_ * D_; ++i)
      d_matrix_[i] = select(nothing, V(T(0)), d_matrix_[i] * d_ladj);
    through_hessian();
    if (args_.inverse) {
      std::fill_n(d_y_, D_, V(T(0)));
      through_gradient();
      tile_.load_rows(args_.d_out, d_y_);
      for (int64_t d = 0; d < D_; ++d) d_y_[d] += d_x_[d];
      solve_lower(D_, tile_.matrix, d_y_);
      solve_upper(D_, tile_.matrix, tile_.reciprocals, d_y_);
      tile_.store_rows(d_y_, args_.d_in, D_);
      if (!args_.param_grads) return;
      for (int64_t d = 0; d < D_; ++d) d_y_[d] = -d_y_[d];
      through_gradient();
    } else {
      tile_.load_rows(args_.d_out, d_y_);
      through_gradient();
      tile_.store_rows(d_x_, args_.d_in, D_);
      if (!args_.param_grads) return;
    }
    for (int64_t k = 0; k < K_; ++k) layer_gradients(k);
    finish_term(args_.slope(), tile_.layers.back().units,
                [&](int64_t j) { return layers_.back().arriving[j]; });
    finish_term(args_.shift(), D_, [&](int64_t d) { return d_y_[d]; });
    finish_term(args_.curvature(), D_,
                [&](int64_t d) { return d_matrix_[d * D_ + d] + d_y_[d] * tile_.x[d]; });
  }

 private:
  // From that of H to those of h and c, and the Hessian's share in dU, dW and db.
  void through_hessian() {
    const int64_t S = tile_.stride;
    for (int64_t k = K_ - 1; k >= 0; --k) {
      const PcpLayer<T>& layer = tile_.layers[size_t(k)];
      const LayerCotangents<T>& d = layers_[size_t(k)];
      const V *spread = layer.spread, *d_matrix = d_matrix_;
      V* d_spread = d_spread_;
      const int64_t D = D_;
      lane_products<T>(
          layer.units, D, D, false, [=](int64_t e, int64_t j) { return spread[j * S + e]; },
          [=](int64_t e, int64_t b) { return d_matrix[e * D + b]; },
          [=](int64_t j, int64_t b, V sum) { d_spread[j * S + b] = sum; });
      for (int64_t j = 0; j < layer.units; ++j) {
        const V twice = T(2) * layer.bend[j];
        V d_bend(T(0));
        for (int64_t i = j * S; i < j * S + D; ++i) {
          d_bend += spread[i] * d_spread[i];
          d_spread[i] = twice * d_spread[i];
          if (k + 1 < K_) d_spread[i] += from_above_[i];
        }
        d.bend[j] = d_bend;
      }
      if (args_.param_grads) input_gradients(k);
      if (!k) break;
      const PcpLayer<T>& before = tile_.layers[size_t(k - 1)];
      if (args_.param_grads) {
        tile_.set_gated(layer, before);
        add_outer(d_spread, layer.units, tile_.work, layer.below, S, D, sum_of(args_.weight(k)));
      }
      for (int64_t i = 0; i < layer.below; ++i) std::fill_n(from_above_ + i * S, D, V(T(0)));
      add_product(layer.w.turned(), d_spread, S, from_above_, S, D);
      for (int64_t i = 0; i < layer.below; ++i) {
        V d_rate(T(0));
        for (int64_t at = i * S; at < i * S + D; ++at) {
          d_rate += from_above_[at] * before.spread[at];
          from_above_[at] = from_above_[at] * layer.rate[i];
        }
        d.rate[i] = d_rate;
      }
    }
  }

  // What the direct part b U of T gives to b and U.
  void input_gradients(int64_t k) {
    const PcpLayer<T>& layer = tile_.layers[size_t(k)];
    V* d_scale = layers_[size_t(k)].scale;
    std::fill_n(d_scale, D_, V(T(0)));
    LaneSums<T> d_input(sum_of(args_.input(k)));
    for (int64_t j = 0; j < layer.units; ++j)
      for (int64_t d = 0; d < D_; ++d) {
        const V d_spread = d_spread_[j * tile_.stride + d];
        d_input.push(layer.scale[d] * d_spread);
        d_scale[d] += d_spread * layer.u.data[j * D_ + d];
      }
  }

  // From d_y and those of h and c to d_x and, on the way, to all that the gradient is made of.
  void through_gradient() {
    for (int64_t k = 0; k < K_; ++k) {  // l comes down through the layers: its cotangent goes up
      const PcpLayer<T>& layer = tile_.layers[size_t(k)];
      const LayerCotangents<T>& d = layers_[size_t(k)];
      for (int64_t i = 0; i < D_; ++i) tile_.features[i] = d_y_[i] * layer.scale[i];
      V* d_leaving = d.arriving;
      std::fill_n(d_leaving, layer.units, V(T(0)));
      add_product(layer.u, tile_.features, d_leaving);
      if (k) {
        const V* d_arriving = layers_[size_t(k - 1)].arriving;
        for (int64_t i = 0; i < layer.below; ++i) d.pulled[i] = d_arriving[i] * layer.gate[i];
        add_product(layer.w, d.pulled, d_leaving);
      }
      for (int64_t j = 0; j < layer.units; ++j) {
        const V total = d_leaving[j] + d.bend[j] * layer.flat[j];
        d.steep[j] = total * layer.arriving[j] - d.bend[j] * layer.leaving[j];
        d.arriving[j] = total * layer.steep[j];
      }
      if (k + 1 == K_) break;
      const V *d_rate = layers_[size_t(k + 1)].rate, *gate = tile_.layers[size_t(k + 1)].gate;
      for (int64_t j = 0; j < layer.units; ++j) d.steep[j] += d_rate[j] * gate[j];
    }
    for (int64_t i = 0; i < D_; ++i) d_x_[i] = tile_.curvature[i] * d_y_[i];
    for (int64_t k = K_ - 1; k >= 0; --k) {
      const PcpLayer<T>& layer = tile_.layers[size_t(k)];
      const LayerCotangents<T>& d = layers_[size_t(k)];
      const bool top = k + 1 == K_;
      for (int64_t j = 0; j < layer.units; ++j) {
        V d_value = d.steep[j] * layer.flat[j];
        if (!top)
          d_value += layers_[size_t(k + 1)].through_weight[j] * tile_.layers[size_t(k + 1)].gate[j];
        d.p[j] = d_value * layer.steep[j];
      }
      std::fill_n(d.through_input, D_, V(T(0)));
      add_product(layer.u.turned(), d.p, d.through_input);
      for (int64_t i = 0; i < D_; ++i) d_x_[i] += layer.scale[i] * d.through_input[i];
      if (!k) break;
      std::fill_n(d.through_weight, layer.below, V(T(0)));
      add_product(layer.w.turned(), d.p, d.through_weight);
    }
  }

  // What the gradient gives to the tensors of a layer.
  void layer_gradients(int64_t k) {
    const PcpLayer<T>& layer = tile_.layers[size_t(k)];
    const LayerCotangents<T>& d = layers_[size_t(k)];
    {
      LaneSums<T> d_input(sum_of(args_.input(k)));
      for (int64_t j = 0; j < layer.units; ++j)
        for (int64_t i = 0; i < D_; ++i)
          d_input.push(layer.scale[i] * (layer.leaving[j] * d_y_[i] + d.p[j] * tile_.x[i]));
    }
    finish_term(args_.offset(k), layer.units, [&](int64_t j) { return d.p[j]; });
    if (args_.conditional)
      finish_term(args_.scale(k), D_, [&](int64_t i) {
        return d.scale[i] + d_y_[i] * layer.pushed[i] + d.through_input[i] * tile_.x[i];
      });
    if (!k) return;
    const PcpLayer<T>& before = tile_.layers[size_t(k - 1)];
    for (int64_t j = 0; j < layer.units; ++j) {
      pairs_[2 * j] = layer.leaving[j];
      pairs_[2 * j + 1] = d.p[j];
    }
    for (int64_t i = 0; i < layer.below; ++i) {
      pairs_below_[2 * i] = d.pulled[i];
      pairs_below_[2 * i + 1] = layer.gate[i] * before.value[i];
    }
    add_outer(pairs_, layer.units, pairs_below_, layer.below, 2, 2, sum_of(args_.weight(k)));
    const V* d_arriving = layers_[size_t(k - 1)].arriving;
    if (args_.conditional)
      finish_term(args_.gate(k), layer.below, [&](int64_t i) {
        return d_arriving[i] * layer.pulled[i] + d.through_weight[i] * before.value[i] +
               d.rate[i] * before.steep[i];
      });
  }

  // The gradient of a term: of each row, or the sum over the rows.
  template <class F>
  void finish_term(const PcpTensor& term, int64_t n, F gradient) {
    if (term.shared) {
      LaneSums<T> sums(sum_of(term));
      for (int64_t i = 0; i < n; ++i) sums.push(gradient(i));
    } else {
      for (int64_t i = 0; i < n; ++i) term_[i] = gradient(i);
      tile_.store_rows(term_, term.grad, n);
    }
  }
  T* sum_of(const PcpTensor& tensor) const { return sums_ + shared_->place(tensor); }

  const PcpArgs& args_;
  PcpTile<T> tile_;
  const int64_t D_, K_;
  std::vector<LayerCotangents<T>> layers_;
  V *d_y_, *d_x_;              // (D)
  V *d_matrix_, *square_;      // (D, D), the other one to work in
  V *d_spread_, *from_above_;  // of T_k, and what T_{k+1} gives to T_k
  V *pairs_, *pairs_below_;    // (H, 2)
  V* term_;
  const SharedSums<T>* shared_ = nullptr;
  T* sums_ = nullptr;
};

template <class T>
struct SumsMemory;

// The batch is cut into chunks whose number depends on sizes only; their sums are added in order,
// so that gradients do not depend on the number of threads.
template <class T>
void backward(const PcpArgs& args) {
  constexpr int64_t most_chunks = 32, most_bytes = int64_t(64) << 20;
  const SharedSums<T> shared(args);
  const int64_t size = shared.size(), tiles = tile_count<T>(args);
  int64_t chunks = std::clamp<int64_t>(tiles, 1, most_chunks);
  if (size) chunks = std::clamp<int64_t>(most_bytes / (size * int64_t(sizeof(T))), 1, chunks);
  const int64_t length = std::max<int64_t>((tiles + chunks - 1) / chunks, 1);
  chunks = std::max<int64_t>((tiles + length - 1) / length, 1);
  using S = Scratch<SumsMemory<T>>;
  S scratch(S::template bytes<T>(chunks * size));
  T* sums = scratch.template take<T>(chunks * size);
  parallel_tasks(chunks, tiles * tile_cycles(args) > kThreadCycles, [&](int64_t chunk) {
    std::fill_n(sums + chunk * size, size, T(0));
    with_workspace<TileCotangents<T>>(args, [&](TileCotangents<T>& cotangents) {
      for (int64_t tile = chunk * length; tile < std::min(tiles, (chunk + 1) * length); ++tile)
        cotangents.run(tile, shared, sums + chunk * size);
    });
  });
  if (args.param_grads) shared.finish(sums, chunks);
}

}  // namespace

void pcp_backward_cpu(const PcpArgs& args) {
  args.is_double ? backward<double>(args) : backward<float>(args);
}

}  // namespace fastflow
