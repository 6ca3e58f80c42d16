// Backward of the inverse: one sweep over the features in reverse. The cotangent of a feature is
// complete when all later ones are done; it gives the cotangents of its outputs, they those of the
// hidden units that became known before it.
#include "autoregressive_layer.h"
#include "autoregressive_outer.h"
#include "autoregressive_scale.h"
#include "autoregressive_sweep.h"

namespace fastflow {
namespace {

template <class T>
struct ReverseScratch;

// A tile of rows on its way back. Layer l = 0 .. L maps level l to level l + 1.
template <class T>
class ReverseTile {
 public:
  // `cotangents` (dP_1 .. dP_{L+1}) and `activations` (A_0 .. A_L) are filled.
  ReverseTile(const AutoregressiveArgs& args, const Network<T>& net, const Schedule<T>& schedule,
              const TileShape& shape, int64_t tile, T* cotangents, T* activations)
      : args_(args),
        net_(net),
        schedule_(schedule),
        shape_(shape),
        tile_(tile),
        R_(shape.rows),
        first_(tile * shape.rows),
        live_(shape.live_rows(tile)),
        vectors_(shape.live_vectors<T>(tile)),
        pre_(static_cast<const T*>(args.saved) + first_ * shape.total + args.context_units() * R_),
        cotangents_(cotangents),
        activations_(activations),
        memory_(bytes(args, shape)) {
    dx_ = memory_.template take<T>(R_ * args.features);
    dladj_ = memory_.template take<T>(R_);
  }

  void run() {
    const int64_t D = args_.features, hidden = net_.layer_count - 1;
    load_tile(static_cast<const T*>(args_.x) + first_ * D, D, live_, D, net_.position, activations_,
              R_);
    load_tile(static_cast<const T*>(args_.d_out) + first_ * D, D, live_, D, net_.position, dx_, R_);
    std::fill_n(dladj_, R_, T(0));
    std::copy_n(static_cast<const T*>(args_.d_ladj) + first_, live_, dladj_);
    std::fill_n(cotangents_, schedule_.offset(hidden) * R_, T(0));

    const int64_t large = schedule_.large;
    for (int64_t f0 = (D - 1) / large * large; f0 >= 0; f0 -= large)
      sweep(f0, std::min(D, f0 + large));
    for (int64_t level = hidden; level >= 1; --level)
      complete(level, 0, schedule_.known(level, 0), net_.layers[level].rows);
    finish();
  }

 private:
  const AutoregressiveArgs& args_;
  const Network<T>& net_;
  const Schedule<T>& schedule_;
  const TileShape& shape_;
  const int64_t tile_, R_, first_, live_, vectors_;
  const T* pre_;
  T* cotangents_;
  T* activations_;
  Scratch<ReverseScratch<T>> memory_;
  T* dx_;  // (D, R), overwritten by dy feature by feature
  T* dladj_;

  static size_t bytes(const AutoregressiveArgs& args, const TileShape& shape) {
    using S = Scratch<ReverseScratch<T>>;
    return S::template bytes<T>(shape.rows * args.features) + S::template bytes<T>(shape.rows);
  }
  // The cotangent of a level, before its activation's slope that of the activations.
  T* cotangent(int64_t level) const {
    return level == 0 ? dx_ : cotangents_ + schedule_.offset(level - 1) * R_;
  }

  // Features f0 .. f1 - 1, a large block.
  void sweep(int64_t f0, int64_t f1) {
    const int64_t hidden = net_.layer_count - 1, block = schedule_.block;
    gather(f0, f1, args_.features);
    for (int64_t b0 = f0 + (f1 - 1 - f0) / block * block; b0 >= f0; b0 -= block) {
      const int64_t b1 = std::min(f1, b0 + block);
      // A block of a single feature has nothing to share: its products end with the large block.
      const int64_t end = b1 - b0 == 1 ? f1 : b1;
      gather(b0, end, f1);
      const auto done = [&](int64_t level) { return schedule_.known(level + 1, end); };
      for (int64_t r = b1 - 1; r >= b0; --r) {
        for (int64_t level = hidden; level >= 1; --level)
          complete(level, schedule_.known(level, r), schedule_.known(level, r + 1), done(level));
        add(0, r, r + 1, done(0));
        solve(r);
      }
    }
  }

  // dA of the units that features f0 .. f1 - 1 determine, by those readers that features f1 .. end
  // - 1 determine.
  void gather(int64_t f0, int64_t f1, int64_t end) {
    for (int64_t level = net_.layer_count - 1; f1 < end && level >= 0; --level) {
      const SortedLayer<T>& layer = net_.layers[level];
      const Range above{schedule_.known(level + 1, f1), schedule_.known(level + 1, end)};
      const Range below{schedule_.known(level, f0), schedule_.known(level, f1)};
      if (live_ <= kNarrowRows)
        narrow_transposed(layer.weight, layer.columns, above, below, layer.prefix, layer.start,
                          cotangent(level + 1), cotangent(level), R_, live_);
      else
        product(level, below, above);
    }
  }

  // dA of units first .. last - 1, by what reads them before unit `end` of the level after.
  void add(int64_t level, int64_t first, int64_t last, int64_t end) {
    product(level, {first, last}, {0, end});
  }

  // dA of the units `below`, by those of the units `above` in the level after that read them.
  void product(int64_t level, Range below, Range above) {
    const SortedLayer<T>& layer = net_.layers[level];
    const auto multiply = [&](Strided<T> w, int64_t begin, int64_t end) {
      stair_product(w, cotangent(level + 1), cotangent(level) + begin * R_, R_, vectors_,
                    end - begin, [&](int64_t j) {
                      return Range{std::max<int64_t>(layer.start[begin + j], above.begin),
                                   above.end};
                    });
    };
    if (!layer.packed.data)
      return multiply(layer.transposed().from_unit(below.begin), below.begin, below.end);
    // Panel by panel; the first may be entered in its midst.
    for (int64_t j = below.begin; j < below.end;) {
      const int64_t panel = j / kUnits * kUnits, end = std::min(below.end, panel + kUnits);
      const Strided<T> w = layer.packed.from_unit(panel);
      multiply(w.from_unit(j - panel), j, end);
      j = end;
    }
  }

  // The last products of hidden units, then their dP and A.
  void complete(int64_t level, int64_t first, int64_t last, int64_t end) {
    if (first == last) return;
    add(level, first, last, end);
    const int64_t begin = schedule_.offset(level - 1) + first, units = last - first;
    const T* p = pre_ + begin * R_;
    T* a = activations_ + (args_.features + begin) * R_;
    if (net_.layers[level - 1].linear) {
      std::copy_n(p, units * R_, a);
      return;
    }
    const bool skipped = level + 1 < net_.layer_count && net_.layers[level + 1].skip;
    activate_units_backward(args_.activation, p,
                            skipped ? cotangent(level + 2) + first * R_ : nullptr, units, R_,
                            vectors_, cotangent(level) + first * R_, a);
  }

  // dy_r in place of dx_r, and the cotangents of m_r and a_r.
  void solve(int64_t r) {
    using V = Vec<T>;
    const int64_t outputs = schedule_.offset(net_.layer_count - 1) + 2 * r;
    const T *m = pre_ + outputs * R_, *x = activations_ + r * R_;
    const T c0 = T(args_.c0), c1 = T(args_.c1);
    T *dx = dx_ + r * R_, *dm = cotangents_ + outputs * R_;
    with_scale(args_.scale, [&](auto kind) {
      for (int64_t v = 0; v < vectors_ * V::lanes; v += V::lanes) {
        const auto map = scale_map<kind>(V::load(m + R_ + v), c0, c1);
        const V g = V::load(dx + v), dy = g / map.s, in = V::load(x + v);
        const V from = kind == Scale::gate ? in - V::load(m + v) : in;
        dy.store(dx + v);
        (kind == Scale::gate ? -(map.complement * dy) : -dy).store(dm + v);
        ((-(g * from) - V::load(dladj_ + v)) * map.slope).store(dm + R_ + v);
      }
    });
  }

  void finish() {
    const int64_t D = args_.features;
    if (args_.d_in)
      store_tile(dx_, R_, net_.position, live_, D, static_cast<T*>(args_.d_in) + first_ * D, D);
    if (net_.context)
      backward_context(args_, *net_.context, shape_, tile_, cotangents_,
                       cotangents_ + cotangent_units(net_) * R_,
                       activations_ + activation_units(net_) * R_);
    for (int64_t l = 0; l < net_.layer_count; ++l) {
      const int64_t n = net_.layers[l].rows;
      if (T* dterm = static_cast<T*>(args_.layers[l].dterm))
        store_tile(cotangent(l + 1), R_, net_.layers[l].position, live_, n, dterm + first_ * n, n);
    }
  }
};

template <class T>
void inverse_backward(const AutoregressiveArgs& args) {
  const Network<T> network(args, args.batch >= kPackedRows ? Weights::packed : Weights::sorted);
  const Schedule<T> schedule(network);
  const TileShape shape(args);
  backward_tiles(args, network, shape, [&](int64_t tile, T* cotangents, T* activations) {
    ReverseTile<T>(args, network, schedule, shape, tile, cotangents, activations).run();
  });
}

}  // namespace

void autoregressive_inverse_backward_cpu(const AutoregressiveArgs& args) {
  args.is_double ? inverse_backward<double>(args) : inverse_backward<float>(args);
}

}  // namespace fastflow
