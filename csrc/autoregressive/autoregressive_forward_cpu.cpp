// The network of a tile of rows, and the scale map behind it: the parallel direction.
#include "autoregressive_layer.h"
#include "autoregressive_scale.h"

namespace fastflow {
namespace {

template <class T>
struct ForwardScratch;

// y in place of x (both sorted) and ladj, from the outputs of the network.
template <class T>
void scale_tile(const AutoregressiveArgs& args, const T* outputs, int64_t R, int64_t vectors, T* x,
                T* ladj) {
  using V = Vec<T>;
  const T c0 = T(args.c0), c1 = T(args.c1);
  with_scale(args.scale, [&](auto kind) {
    for (int64_t r = 0; r < vectors * V::lanes; r += V::lanes) {
      V total(T(0));
      for (int64_t k0 = 0; k0 < args.features; k0 += 64) {
        V sum(T(0));
        for (int64_t k = k0; k < std::min(k0 + 64, args.features); ++k) {
          const V m = V::load(outputs + 2 * k * R + r), in = V::load(x + k * R + r);
          const auto map = scale_map<kind>(V::load(outputs + (2 * k + 1) * R + r), c0, c1);
          const V shift = kind == Scale::gate ? map.complement * m : m;
          (map.s * in + shift).store(x + k * R + r);
          sum += map.l;
        }
        total += sum;
      }
      total.store(ladj + r);
    }
  });
}

template <class T>
void forward_tile(const AutoregressiveArgs& args, const Network<T>& network, const TileShape& shape,
                  int64_t tile) {
  using S = Scratch<ForwardScratch<T>>;
  const int64_t R = shape.rows, D = args.features, N = args.outputs();
  const int64_t live = shape.live_rows(tile), vectors = shape.live_vectors<T>(tile);
  T* saved = static_cast<T*>(args.saved);
  S scratch(S::template bytes<T>(D * R) + 2 * S::template bytes<T>(network.widest * R) +
            (saved ? 0 : S::template bytes<T>(shape.total * R)) +
            (network.context ? S::template bytes<T>(network.context->columns * R) : 0) +
            (args.affine ? 0 : S::template bytes<T>(N * R)));
  T* x = scratch.template take<T>(D * R);
  T* a = scratch.template take<T>(network.widest * R);
  T* a_next = scratch.template take<T>(network.widest * R);
  T* levels = saved ? saved + tile * R * shape.total : scratch.template take<T>(shape.total * R);
  T* outputs = args.affine ? levels + (shape.total - N) * R : scratch.template take<T>(N * R);

  load_tile(static_cast<const T*>(args.x) + tile * R * D, D, live, D, network.position, x, R);
  const T* in = x;
  const T *before_last = nullptr, *last = nullptr;
  T* p = levels + args.context_units() * R;
  if (network.context)
    forward_context(args, *network.context, shape, tile, levels, p,
                    scratch.template take<T>(network.context->columns * R));
  for (int64_t l = 0; l < network.layer_count; ++l) {
    const SortedLayer<T>& layer = network.layers[l];
    if (l + 1 == network.layer_count) p = outputs;
    forward_layer(layer, args.activation, in, before_last, shape, tile, p, a_next);
    in = layer.linear ? p : a_next;
    std::swap(a, a_next);
    before_last = last;
    last = p;
    p += layer.rows * R;
  }
  if (saved) clear_unused(levels, shape.total, R, vectors * Vec<T>::lanes);

  T* y = static_cast<T*>(args.y);
  if (args.affine) {
    T ladj[64];
    scale_tile(args, outputs, R, vectors, x, ladj);
    store_tile(x, R, network.position, live, D, y + tile * R * D, D);
    std::copy_n(ladj, live, static_cast<T*>(args.ladj) + tile * R);
  } else {
    store_tile(outputs, R, network.layers[network.layer_count - 1].position, live, N,
               y + tile * R * N, N);
  }
}

template <class T>
struct SavedScratch;

// Wide tiles one after the other, and the weights as they lie.
template <class T>
void forward_unsorted(const AutoregressiveArgs& args) {
  const Network<T> network(args, Weights::unsorted);
  const TileShape shape(args), wide = shape.widened();
  const bool copied = args.saved && shape.rows != wide.rows;
  const int64_t size = copied ? wide.count * wide.rows * shape.total : 0;
  AutoregressiveArgs given = args;
  using S = Scratch<SavedScratch<T>>;
  S scratch(S::template bytes<T>(size));
  if (copied) given.saved = scratch.template take<T>(size);
  for (int64_t tile = 0; tile < wide.count; ++tile) forward_tile(given, network, wide, tile);
  if (copied)
    for_tiles(shape, wide, static_cast<T*>(args.saved), static_cast<const T*>(given.saved),
              [&](T* to, const T* from) { std::copy_n(from, shape.rows, to); });
}

template <class T>
void forward(const AutoregressiveArgs& args) {
  if (Network<T>::leaves(args)) return forward_unsorted<T>(args);
  const Network<T> network(args);
  const TileShape shape(args);
  parallel_tasks(shape.count, network.cycles(args.batch) > kThreadCycles,
                 [&](int64_t tile) { forward_tile(args, network, shape, tile); });
}

}  // namespace

void autoregressive_forward_cpu(const AutoregressiveArgs& args) {
  args.is_double ? forward<double>(args) : forward<float>(args);
}

}  // namespace fastflow
