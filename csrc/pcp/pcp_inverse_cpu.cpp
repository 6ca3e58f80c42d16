// The inverse by damped Newton, as fastflow/reference/pcp_inverse.py describes it: every lane goes
// its own way, and a tile is done when all its lanes have arrived.
#include <limits>

#include "pcp_tile.h"

namespace fastflow {
namespace {

constexpr int kSmaller = 6;
constexpr int kMostSteps = 500;

template <class T>
class Newton {
 public:
  using V = Vec<T>;

  Newton(const PcpArgs& args, Arena& arena)
      : args_(args), tile_(args, arena), D_(args.features), K_(args.layers) {
    for (V** of_features : {&y_, &g_, &step_, &trial_, &diagonal_})
      *of_features = tile_.take(arena, D_);
    int64_t most = D_;
    for (const PcpLayer<T>& layer : tile_.layers) most = std::max(most, layer.units);
    for (V** of_units : {&size_, &size_above_}) *of_units = tile_.take(arena, most);
  }

  void run(int64_t number) {
    tile_.load_terms(number);
    tile_.load_rows(args_.in, y_);
    V* x = tile_.x;
    std::fill_n(x, D_, V(T(0)));
    evaluate(x);
    auto live = first_lanes<T>(int(tile_.rows));
    for (int64_t d = 0; d < D_; ++d) live = live & (abs(g_[d]) <= Limits<T>::max);
    std::fill_n(x, D_, select(live, V(T(0)), V(T(__builtin_nan("")))));
    for (int i = 0; i < kMostSteps && any(live); ++i) live = live & (!newton_step(live));
    evaluate(x);
    tile_.hessian();
    tile_.store_rows(x, args_.out, D_);
    tile_.store_numbers(-factorise(D_, tile_.matrix, tile_.reciprocals), args_.ladj);
  }

 private:
  static constexpr T eps = std::numeric_limits<T>::epsilon();

  // Moves the lanes in `live` by a damped step; returns which have arrived.
  Mask<T> newton_step(Mask<T> live) {
    V* x = tile_.x;
    const V value = evaluate(x);
    tile_.hessian();
    positive_factor();
    std::copy_n(g_, D_, step_);
    solve_lower(D_, tile_.matrix, step_);
    const V energy = energy_of(step_);
    solve_upper(D_, tile_.matrix, tile_.reciprocals, step_);
    const V error = T(8) * eps * magnitude();
    const V shortest = T(1) / T(1 << kSmaller) * min(V(T(1)), error / energy);
    V length(T(0)), left = energy;
    const auto lost = live & !(abs(energy) <= Limits<T>::max);  // no step is to be measured
    auto searching = live & !lost;
    // a shortest step may have been rounded to 0
    for (T t(1); any(searching) && t >= std::numeric_limits<T>::min(); t /= 2) {
      for (int64_t d = 0; d < D_; ++d) trial_[d] = x[d] - t * step_[d];
      const V value_t = evaluate(trial_);
      solve_lower(D_, tile_.matrix, g_);
      const V energy_t = energy_of(g_);
      const auto coarse = t * energy <= error;
      const auto lower = value_t <= value - T(0.2) * t * energy;
      const auto nearer = energy_t <= (1 - t / 2) * (1 - t / 2) * energy;
      const auto taken = searching & ((coarse & nearer) | ((!coarse) & lower));
      length = select(taken, V(t), length);
      left = select(taken, energy_t, left);
      searching = searching & (!taken) & (shortest <= t / 2);
    }
    const auto stays = length <= T(0);
    V negligible(T(0));
    for (int64_t d = 0; d < D_; ++d) {
      x[d] = select(stays, x[d], x[d] - length * step_[d]);
      x[d] = select(lost, V(T(__builtin_nan(""))), x[d]);
      negligible += diagonal_[d] * (eps * x[d]) * (eps * x[d]);
    }
    return stays | (left <= negligible);
  }

  // F at a point, and its gradient g.
  V evaluate(const V* at) {
    tile_.activate(at, true);
    tile_.gradient(at);
    const PcpLayer<T>& top = tile_.layers.back();
    V value(T(0)), linear(T(0));
    for (int64_t j = 0; j < top.units; ++j) value += tile_.slope[j] * top.value[j];
    for (int64_t d = 0; d < D_; ++d) {
      g_[d] = tile_.y[d] - y_[d];
      linear += at[d] * (tile_.shift[d] - y_[d] + T(0.5) * tile_.curvature[d] * at[d]);
    }
    return value + linear;
  }

  // The factors of H, of a diagonal bound on it where rounding makes it fail; its diagonal.
  void positive_factor() {
    V* matrix = tile_.matrix;
    for (int64_t a = 0; a < D_; ++a) {
      diagonal_[a] = matrix[a * D_ + a];
      size_[a] = V(T(0));
      for (int64_t b = 0; b < D_; ++b) size_[a] += abs(matrix[a > b ? a * D_ + b : b * D_ + a]);
    }
    const V log_det = factorise(D_, matrix, tile_.reciprocals);
    const auto good = abs(log_det) <= Limits<T>::max;
    for (int64_t a = 0; a < D_; ++a) {
      tile_.reciprocals[a] = select(good, tile_.reciprocals[a], T(1) / size_[a]);
      for (int64_t b = 0; b < a; ++b)
        matrix[a * D_ + b] = select(good, matrix[a * D_ + b], V(T(0)));
    }
  }

  // g H^-1 g, given L^-1 g.
  V energy_of(const V* half) const {
    V energy(T(0));
    for (int64_t d = 0; d < D_; ++d) energy += half[d] * (half[d] * tile_.reciprocals[d]);
    return energy;
  }

  // The sum of the absolute values of all that F(x) is made of, in `size_` layer by layer.
  V magnitude() {
    const V* x = tile_.x;
    for (int64_t k = 0; k < K_; ++k) {
      const PcpLayer<T>& layer = tile_.layers[size_t(k)];
      for (int64_t i = 0; i < layer.below; ++i) size_[i] = layer.gate[i] * (size_[i] + T(1));
      for (int64_t j = 0; j < layer.units; ++j) {
        V size = abs(layer.offset[j]);
        for (int64_t d = 0; d < D_; ++d)
          size += abs(layer.scale[d] * x[d] * layer.u.data[j * D_ + d]);
        size_above_[j] = size;
      }
      if (k) add_product(layer.w, size_, size_above_);
      std::swap(size_, size_above_);
    }
    V sum(T(0));
    for (int64_t j = 0; j < tile_.layers.back().units; ++j)
      sum += tile_.slope[j] * (size_[j] + T(1));
    for (int64_t d = 0; d < D_; ++d)
      sum += abs(tile_.shift[d] * x[d]) + abs(x[d] * y_[d]) +
             T(0.5) * tile_.curvature[d] * x[d] * x[d];
    return sum;
  }

  const PcpArgs& args_;
  PcpTile<T> tile_;
  const int64_t D_, K_;
  V *y_, *g_, *step_, *trial_, *diagonal_;  // (D)
  V *size_, *size_above_;                   // (max H or D)
};

template <class T>
void inverse(const PcpArgs& args) {
  const int64_t tiles = tile_count<T>(args);
  parallel_tasks(tiles, tiles * tile_cycles(args) > kThreadCycles / 8, [&](int64_t task) {
    with_workspace<Newton<T>>(args, [&](Newton<T>& newton) { newton.run(task); });
  });
}

}  // namespace

void pcp_inverse_cpu(const PcpArgs& args) {
  args.is_double ? inverse<double>(args) : inverse<float>(args);
}

}  // namespace fastflow
