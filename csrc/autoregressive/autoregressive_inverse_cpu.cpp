// The inverse of an affine autoregressive map in one sweep over its features. The arithmetic is
// that of one pass of the network, not of D passes.
#include "autoregressive_layer.h"
#include "autoregressive_scale.h"
#include "autoregressive_sweep.h"

namespace fastflow {
namespace {

template <class T>
struct InverseScratch;

// A tile of rows on its way through the sweep. Layer l = 0 .. L maps level l to level l + 1.
template <class T>
class InverseTile {
 public:
  InverseTile(const AutoregressiveArgs& args, const Network<T>& net, const Schedule<T>& schedule,
              const TileShape& shape, int64_t tile)
      : args_(args),
        net_(net),
        schedule_(schedule),
        shape_(shape),
        tile_(tile),
        R_(shape.rows),
        first_(tile * shape.rows),
        live_(shape.live_rows(tile)),
        vectors_(shape.live_vectors<T>(tile)),
        total_(shape.total),
        memory_(bytes(args, net, shape)) {
    levels_ = args.saved ? static_cast<T*>(args.saved) + tile * R_ * total_
                         : memory_.template take<T>(R_ * total_);
    pre_ = levels_ + args.context_units() * R_;
    x_ = memory_.template take<T>(R_ * args.features);
    act_ = memory_.template take<T>(R_ * total_);
    ladj_ = memory_.template take<T>(R_);
    ladj_part_ = memory_.template take<T>(R_);
  }

  void run() {
    const int64_t D = args_.features, hidden = net_.layer_count - 1;
    load_tile(static_cast<const T*>(args_.y) + first_ * D, D, live_, D, net_.position, x_, R_);
    for (int64_t l = 0; l <= hidden; ++l) load_term(l);
    if (net_.context)
      forward_context(args_, *net_.context, shape_, tile_, levels_, pre_,
                      memory_.template take<T>(R_ * net_.context->columns));
    std::fill_n(ladj_, R_, T(0));
    std::fill_n(ladj_part_, R_, T(0));

    for (int64_t l = 0; l < hidden; ++l) {
      start(l, 0, schedule_.known(l + 1, 0));
      complete(l, 0, schedule_.known(l + 1, 0), 0);
    }
    for (int64_t f0 = 0; f0 < D; f0 += schedule_.block) {
      const int64_t f1 = std::min(D, f0 + schedule_.block);
      // begun here, not all at once: the cache holds them when the products are added
      for (int64_t l = 0; l <= hidden; ++l)
        start(l, schedule_.known(l + 1, f0), schedule_.known(l + 1, f1));
      // A block of a single feature has nothing to share: its products begin at unit 0.
      const int64_t before = f1 - f0 == 1 ? -1 : f0;
      if (before >= 0)
        for (int64_t l = 0; l <= hidden; ++l) gather(l, f0, f1);
      const auto known = [&](int64_t level) {
        return before < 0 ? 0 : schedule_.known(level, before);
      };
      for (int64_t r = f0; r < f1; ++r) {
        add(hidden, 2 * r, 2 * r + 2, known(hidden));
        solve(r);
        for (int64_t l = 0; l < hidden; ++l)
          complete(l, schedule_.known(l + 1, r), schedule_.known(l + 1, r + 1), known(l));
      }
    }
    finish();
  }

 private:
  const AutoregressiveArgs& args_;
  const Network<T>& net_;
  const Schedule<T>& schedule_;
  const TileShape& shape_;
  const int64_t tile_, R_, first_, live_, vectors_, total_;
  Scratch<InverseScratch<T>> memory_;
  T* levels_;  // (total, R), as in `saved`
  T* pre_;     // of these, pre-activations P_1 .. P_L and outputs O
  T* x_;       // (D, R): y, overwritten feature by feature
  T* act_;     // (total, R): activations
  T* ladj_;    // (R)
  T* ladj_part_;

  static size_t bytes(const AutoregressiveArgs& args, const Network<T>& net,
                      const TileShape& shape) {
    using S = Scratch<InverseScratch<T>>;
    return (args.saved ? 1 : 2) * S::template bytes<T>(shape.rows * shape.total) +
           (net.context ? S::template bytes<T>(shape.rows * net.context->columns) : 0) +
           S::template bytes<T>(shape.rows * args.features) + 2 * S::template bytes<T>(shape.rows);
  }

  T* pre(int64_t l) const { return pre_ + schedule_.offset(l) * R_; }
  T* activations(int64_t l) const { return act_ + schedule_.offset(l) * R_; }
  const T* input(int64_t l) const {
    if (l == 0) return x_;
    return net_.layers[l - 1].linear ? pre(l - 1) : activations(l - 1);
  }

  // P = T, if there is a T.
  void load_term(int64_t l) {
    const SortedLayer<T>& layer = net_.layers[l];
    if (layer.term)
      load_tile(layer.term + first_ * layer.rows, layer.rows, live_, layer.rows, layer.position,
                pre(l), R_);
  }

  // P += b, or P = b where there is no T, for units first .. last - 1.
  void start(int64_t l, int64_t first, int64_t last) {
    const SortedLayer<T>& layer = net_.layers[l];
    start_units<T>(layer.bias ? layer.bias + first : nullptr, layer.term || layer.started, nullptr,
                   last - first, R_, vectors_, pre(l) + first * R_);
  }

  // P += W A for the units of the block of features [f0, f1) and all that was known before it.
  void gather(int64_t l, int64_t f0, int64_t f1) {
    const SortedLayer<T>& layer = net_.layers[l];
    const int64_t first = schedule_.known(l + 1, f0), known = schedule_.known(l, f0);
    product(l, first, schedule_.known(l + 1, f1),
            [&](int64_t k) { return Range{0, std::min<int64_t>(layer.prefix[k], known)}; });
  }

  // P += W A for units first .. last - 1, over the inputs from `begin`.
  void add(int64_t l, int64_t first, int64_t last, int64_t begin) {
    const SortedLayer<T>& layer = net_.layers[l];
    product(l, first, last, [&](int64_t k) { return Range{begin, layer.prefix[k]}; });
  }

  template <class RangeOf>
  void product(int64_t l, int64_t first, int64_t last, const RangeOf& range) {
    stair_product_rows(net_.layers[l].forward().from_unit(first), input(l), pre(l) + first * R_, R_,
                       live_, last - first, [&](int64_t j) { return range(first + j); });
  }

  // The last products of hidden units, then the units themselves.
  void complete(int64_t l, int64_t first, int64_t last, int64_t begin) {
    if (first == last) return;
    const SortedLayer<T>& layer = net_.layers[l];
    add(l, first, last, begin);
    T* p = pre(l) + first * R_;
    const int64_t units = last - first;
    if (layer.skip) {
      const T* skipped = pre(l - 2) + first * R_;
      for (int64_t k = 0; k < units; ++k)
        for (int64_t v = 0; v < vectors_ * Vec<T>::lanes; v += Vec<T>::lanes)
          add_to(p + k * R_ + v, Vec<T>::load(skipped + k * R_ + v));
    }
    if (!layer.linear)
      activate_units(args_.activation, p, units, R_, vectors_, activations(l) + first * R_);
  }

  // x_r in place of y_r.
  void solve(int64_t r) {
    const T* m = pre(net_.layer_count - 1) + 2 * r * R_;
    const T *a = m + R_, c0 = T(args_.c0), c1 = T(args_.c1);
    T* x = x_ + r * R_;
    with_scale(args_.scale, [&](auto kind) {
      for (int64_t v = 0; v < vectors_ * Vec<T>::lanes; v += Vec<T>::lanes) {
        const auto map = scale_map<kind>(Vec<T>::load(a + v), c0, c1);
        const Vec<T> shift = Vec<T>::load(m + v);
        const Vec<T> shrunk = (Vec<T>::load(x + v) - shift) / map.s;
        (kind == Scale::gate ? shift + shrunk : shrunk).store(x + v);
        add_to(ladj_part_ + v, -map.l);
      }
    });
    if (r % 64 == 63) close_ladj();
  }

  // ladj is a sum of short sums.
  void close_ladj() {
    for (int64_t v = 0; v < vectors_ * Vec<T>::lanes; v += Vec<T>::lanes)
      add_to(ladj_ + v, Vec<T>::load(ladj_part_ + v));
    std::fill_n(ladj_part_, R_, T(0));
  }

  void finish() {
    const int64_t D = args_.features;
    close_ladj();
    store_tile(x_, R_, net_.position, live_, D, static_cast<T*>(args_.x) + first_ * D, D);
    std::copy_n(ladj_, live_, static_cast<T*>(args_.ladj) + first_);
    if (args_.saved) clear_unused(levels_, total_, R_, vectors_ * Vec<T>::lanes);
  }
};

template <class T>
void inverse(const AutoregressiveArgs& args) {
  const Network<T> network(args);
  const Schedule<T> schedule(network);
  const TileShape shape(args);
  parallel_tasks(shape.count, network.cycles(args.batch) > kThreadCycles,
                 [&](int64_t tile) { InverseTile<T>(args, network, schedule, shape, tile).run(); });
}

}  // namespace

void autoregressive_inverse_cpu(const AutoregressiveArgs& args) {
  args.is_double ? inverse<double>(args) : inverse<float>(args);
}

}  // namespace fastflow
