// Backward of the parallel direction: cotangents tile by tile, then the parameters' gradients.
#include "autoregressive_layer.h"
#include "autoregressive_outer.h"
#include "autoregressive_scale.h"

namespace fastflow {
namespace {

template <class T>
struct TileScratch;

// From dy (in `dx`, sorted) and dladj: the cotangents of the outputs, and what reaches x directly.
template <class T>
void scale_tile_backward(const AutoregressiveArgs& args, const T* outputs, const T* x,
                         const T* dladj, int64_t R, int64_t vectors, T* dx, T* d_outputs) {
  using V = Vec<T>;
  const T c0 = T(args.c0), c1 = T(args.c1);
  with_scale(args.scale, [&](auto kind) {
    for (int64_t k = 0; k < args.features; ++k)
      for (int64_t r = 0; r < vectors * V::lanes; r += V::lanes) {
        const V m = V::load(outputs + 2 * k * R + r), in = V::load(x + k * R + r);
        const auto map = scale_map<kind>(V::load(outputs + (2 * k + 1) * R + r), c0, c1);
        const V dy = V::load(dx + k * R + r), gate_m = kind == Scale::gate ? m : V(T(0));
        const V dm = kind == Scale::gate ? map.complement * dy : dy;
        const V d = map.s * dy;
        const V dl = d * (in - gate_m) + V::load(dladj + r);
        d.store(dx + k * R + r);
        dm.store(d_outputs + 2 * k * R + r);
        (dl * map.slope).store(d_outputs + (2 * k + 1) * R + r);
      }
  });
}

// dP (in `d`) and A of the level that `layer` reads, from dP of the level that it makes.
template <class T>
void backward_level(const SortedLayer<T>& layer, Activation activation, bool linear, const T* d_out,
                    const T* p, const T* d_skipped, int64_t R, int64_t live, T* d, T* a) {
  const int64_t vectors = (live + Vec<T>::lanes - 1) / Vec<T>::lanes;
  const auto before = [&](int64_t j0, int64_t units) {
    std::fill_n(d + j0 * R, units * R, T(0));
    prefetch(p + j0 * R, units * R);
  };
  const auto after = [&](int64_t j0, int64_t units) {
    const int64_t at = j0 * R;
    if (linear)
      std::copy_n(p + at, units * R, a + at);
    else
      activate_units_backward(activation, p + at, d_skipped ? d_skipped + at : nullptr, units, R,
                              vectors, d + at, a + at);
  };
  const auto read_by = [&](int64_t j) { return layer.read_by(j); };
  if (layer.places) {
    before(0, layer.columns);
    unsorted_backward(layer, d_out, d, R, live, [&](int64_t j) { after(j, 1); });
  } else if (live <= kNarrowRows) {
    before(0, layer.columns);
    narrow_transposed(layer.weight, layer.columns, {0, layer.rows}, {0, layer.columns},
                      layer.prefix, layer.start, d_out, d, R, live);
    after(0, layer.columns);
  } else if (layer.packed.data)
    stair_product(layer.packed, d_out, d, R, vectors, layer.columns, read_by, before, after);
  else
    stair_product(layer.transposed(), d_out, d, R, vectors, layer.columns, read_by, before, after);
}

// Fills the tile's cotangents dP_1 .. dP_{L+1} and activations A_0 .. A_L, and writes what has
// rows.
template <class T>
void backward_tile(const AutoregressiveArgs& args, const Network<T>& network,
                   const TileShape& shape, int64_t tile, T* cotangents, T* activations) {
  using S = Scratch<TileScratch<T>>;
  const int64_t R = shape.rows, D = args.features, N = args.outputs(), L = network.layer_count - 1;
  const int64_t live = shape.live_rows(tile), vectors = shape.live_vectors<T>(tile);
  const SortedLayer<T>* layers = network.layers;
  S scratch(S::template bytes<T>(D * R));
  T* dx = scratch.template take<T>(D * R);

  const T* saved = static_cast<const T*>(args.saved) + tile * R * shape.total;
  const T* d_out = static_cast<const T*>(args.d_out) + tile * R * (args.affine ? D : N);
  T* d = cotangents + (cotangent_units(network) - N) * R;
  T* a = activations + activation_units(network) * R;
  const T* p = saved + (shape.total - (args.affine ? N : 0)) * R;
  load_tile(static_cast<const T*>(args.x) + tile * R * D, D, live, D, network.position, activations,
            R);
  if (args.affine) {
    load_tile(d_out, D, live, D, network.position, dx, R);
    T dladj[64] = {};
    std::copy_n(static_cast<const T*>(args.d_ladj) + tile * R, live, dladj);
    scale_tile_backward(args, p, activations, dladj, R, vectors, dx, d);
  } else {
    load_tile(d_out, N, live, N, layers[L].position, d, R);
    std::fill_n(dx, D * R, T(0));
  }
  for (int64_t l = L; l >= 1; --l) {
    const SortedLayer<T>& layer = layers[l];
    p -= layer.columns * R;
    a -= layer.columns * R;
    T* below = d - layer.columns * R;
    // Level l + 2 follows level l + 1, whose cotangent is d.
    const T* skipped = l < L && layers[l + 1].skip ? d + layer.rows * R : nullptr;
    backward_level(layer, args.activation, layers[l - 1].linear, d, p, skipped, R, live, below, a);
    d = below;
  }
  if (args.d_in)
    backward_input(layers[0], d, network.position, R, live, dx,
                   static_cast<T*>(args.d_in) + tile * R * D);
  if (network.context)
    backward_context(args, *network.context, shape, tile, cotangents,
                     cotangents + cotangent_units(network) * R,
                     activations + activation_units(network) * R);
  d = cotangents;
  for (int64_t l = 0; l <= L; d += layers[l++].rows * R)
    if (T* dterm = static_cast<T*>(args.layers[l].dterm))
      store_tile(d, R, layers[l].position, live, layers[l].rows, dterm + tile * R * layers[l].rows,
                 layers[l].rows);
}

template <class T>
struct SavedScratch;

// Wide tiles one after the other, and the weights as they lie.
template <class T>
void backward_unsorted(const AutoregressiveArgs& args) {
  const Network<T> network(args, Weights::unsorted);
  const TileShape shape(args), wide = shape.widened();
  const int64_t size = shape.rows != wide.rows ? wide.count * wide.rows * shape.total : 0;
  AutoregressiveArgs given = args;
  using S = Scratch<SavedScratch<T>>;
  S scratch(S::template bytes<T>(size));
  if (size) {
    T* saved = scratch.template take<T>(size);
    for_tiles(shape, wide, static_cast<const T*>(args.saved), saved,
              [&](const T* from, T* to) { std::copy_n(from, shape.rows, to); });
    given.saved = saved;
  }
  backward_tiles(given, network, wide, [&](int64_t tile, T* cotangents, T* activations) {
    backward_tile(given, network, wide, tile, cotangents, activations);
  });
}

template <class T>
void backward(const AutoregressiveArgs& args) {
  if (Network<T>::leaves(args)) return backward_unsorted<T>(args);
  const Network<T> network(args, args.batch >= kPackedRows ? Weights::packed : Weights::sorted);
  const TileShape shape(args);
  backward_tiles(args, network, shape, [&](int64_t tile, T* cotangents, T* activations) {
    backward_tile(args, network, shape, tile, cotangents, activations);
  });
}

}  // namespace

void autoregressive_backward_cpu(const AutoregressiveArgs& args) {
  args.is_double ? backward<double>(args) : backward<float>(args);
}

}  // namespace fastflow
