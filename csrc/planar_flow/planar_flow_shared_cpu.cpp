// Planar chains with parameters shared by the batch. The state is never formed step by step: with
// the K x K products of planar_flow_chain.h a tile of rows needs one thin product for the
// pre-activations, a triangular recurrence of scalars, and one thin product for the output.
#include <bit>

#include "planar_flow_chain.h"
#include "planar_flow_cpu.h"

namespace fastflow {
namespace {

template <class T>
struct TileScratch;

// Cycles of a row and step, roughly.
template <class T>
int64_t row_cycles(const PlanarFlowArgs& args, int64_t per_feature) {
  return args.steps * (per_feature * args.features + args.steps + 100) / Vec<T>::lanes + 20;
}

// sums[v] += sum of m[j] x_j for j from `begin` to `end` (excluded) in steps of `by` = +-1; x by
// step.
template <class T>
FASTFLOW_HD void add_terms(Vec<T> (&sums)[kTileVectors], const T* m, const T* x, int64_t begin,
                           int64_t end, int64_t by) {
  constexpr int lanes = Vec<T>::lanes, width = kTileRows<T>;
  for (int64_t j = begin; j != end; j += by) {
    const Vec<T> m_j(m[j]);
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sums[v] += m_j * Vec<T>::load(x + j * width + v * lanes);
  }
}

// Recurrence of a tile: `r` holds w_i.in; fills a (by natural step) and t = sigma tanh(a).
template <bool Inverse, class T>
void recur(const PlanarChain<T>& chain, const T* b, const T* r, T* t, T* a, T* ladj) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes, width = kTileRows<T>;
  PlanarLadjSum<V> sums[kTileVectors];
  for (int64_t i = 0; i < chain.K; ++i) {
    const int64_t k = chain.source(i);
    const V b_k(b[k]);
    V pre[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) pre[v] = V::load(r + i * width + v * lanes) + b_k;
    add_terms(pre, chain.products + i * chain.padded_steps, t, 0, i, 1);

    const auto step = chain.template at<V>(i);
#pragma GCC unroll 1  // one piece of code, so that every vector's roundings are the same
    for (int v = 0; v < kTileVectors; ++v) {
      const V a_v = Inverse ? planar_solve(pre[v], step) : pre[v];
      const auto tanh_a = planar_tanh(a_v);
      copysign(tanh_a.t, Inverse ? -a_v : a_v).store(t + i * width + v * lanes);
      a_v.store(a + k * width + v * lanes);
      sums[v].add(tanh_a, step);
    }
  }
#pragma GCC unroll 1
  for (int v = 0; v < kTileVectors; ++v) {
    const V total = sums[v].total();
    (Inverse ? -total : total).store(ladj + v * lanes);
  }
}

template <class T>
void forward_tile(const PlanarFlowArgs& args, const PlanarChain<T>& chain, int64_t row) {
  constexpr int width = kTileRows<T>;
  const int64_t rows = std::min<int64_t>(width, args.batch - row), D = chain.D, K = chain.K;
  using S = Scratch<TileScratch<T>>;
  S scratch(3 * S::template bytes<T>(chain.padded_steps * width));
  T* r = scratch.template take<T>(chain.padded_steps * width);
  T* t = scratch.template take<T>(chain.padded_steps * width);
  T* a = scratch.template take<T>(chain.padded_steps * width);

  const T* in = static_cast<const T*>(args.in) + row * D;
  tile_dots(in, rows, D, chain.w, chain.stride, chain.panels, K, r);
  T ladj[width];
  if (args.inverse)
    recur<true>(chain, static_cast<const T*>(args.b), r, t, a, ladj);
  else
    recur<false>(chain, static_cast<const T*>(args.b), r, t, a, ladj);
  std::copy_n(ladj, rows, static_cast<T*>(args.ladj) + row);
  transpose_out(a, width, K, static_cast<T*>(args.a) + row * K, K, rows);
  tile_update(in, static_cast<T*>(args.out) + row * D, rows, D, t, chain.u_hat, chain.stride, K);
}

// Sums over the rows of a chunk of the batch, and where each part of them lies. With
// t = sigma tanh(a): gamma^T in, t^T g, gamma^T t in blocks of 4 x 4 steps, and by lanes db and dp.
template <class T>
struct Sums {
  T *gamma_in, *t_g, *gamma_t, *db, *dp;

  int64_t padded_steps;

  static int64_t rows(const PlanarChain<T>& chain) { return round_up(chain.K, kBlock); }
  static int64_t size(const PlanarChain<T>& chain) {
    return rows(chain) * (2 * chain.stride + chain.padded_steps + 2 * Vec<T>::lanes);
  }
  Sums(T* memory, const PlanarChain<T>& chain)
      : gamma_in(memory),
        t_g(gamma_in + rows(chain) * chain.stride),
        gamma_t(t_g + rows(chain) * chain.stride),
        db(gamma_t + rows(chain) * chain.padded_steps),
        dp(db + rows(chain) * Vec<T>::lanes),
        padded_steps(chain.padded_steps) {}

  // Steps i .. i + 3 of gamma with j .. j + 3 of t, for multiples i, j of 4.
  T* gamma_t_block(int64_t i, int64_t j) const { return gamma_t + i * padded_steps + 4 * j; }
  T gamma_t_at(int64_t i, int64_t j) const {
    return gamma_t_block(i / 4 * 4, j / 4 * 4)[4 * (i % 4) + j % 4];
  }
};

// Reverse recurrence of a tile: `h` holds u_hat_i.g; fills gamma and t = sigma tanh(a).
template <bool Inverse, class T>
void recur_backward(const PlanarChain<T>& chain, const T* h, const T* a, const T* g_ladj,
                    bool param_grads, T* gamma, T* t, const Sums<T>& sums) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes, width = kTileRows<T>;
  for (int64_t i = chain.K - 1; i >= 0; --i) {
    V h_i[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) h_i[v] = V::load(h + i * width + v * lanes);
    add_terms(h_i, chain.products + i * chain.padded_steps, gamma, chain.K - 1, i, -1);

    const auto step = chain.template at<V>(i);
    V db(T(0)), dp(T(0));
#pragma GCC unroll 1  // see recur
    for (int v = 0; v < kTileVectors; ++v) {
      const V pre = V::load(a + chain.source(i) * width + v * lanes);
      const auto pull = pull_back(pre, h_i[v], V::load(g_ladj + v * lanes), step, Inverse);
      pull.gamma.store(gamma + i * width + v * lanes);
      pull.t.store(t + i * width + v * lanes);
      db += pull.gamma;
      dp += pull.dp;
    }
    if (param_grads) {
      add_to(sums.db + i * lanes, db);
      add_to(sums.dp + i * lanes, dp);
    }
  }
}

template <class T>
void backward_tile(const PlanarFlowArgs& args, const PlanarChain<T>& chain, int64_t row,
                   const Sums<T>& sums) {
  constexpr int width = kTileRows<T>;
  const int64_t rows = std::min<int64_t>(width, args.batch - row), D = chain.D, K = chain.K;
  using S = Scratch<TileScratch<T>>;
  S scratch(4 * S::template bytes<T>(chain.padded_steps * width));
  T* h = scratch.template take<T>(chain.padded_steps * width);
  T* a = scratch.template take<T>(chain.padded_steps * width);
  T* gamma = scratch.template take<T>(chain.padded_steps * width);
  T* t = scratch.template take<T>(chain.padded_steps * width);

  const T* g = static_cast<const T*>(args.d_out) + row * D;
  const int64_t blocked_steps = round_up(K, kBlock);
  tile_dots(g, rows, D, chain.u_hat, chain.stride, chain.panels, K, h);
  transpose_in(static_cast<const T*>(args.a) + row * K, K, rows, K, a, width);
  T g_ladj[width] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T value = static_cast<const T*>(args.dladj)[row + r];
    g_ladj[r] = args.inverse ? -value : value;
  }
  std::fill_n(gamma + K * width, (blocked_steps - K) * width, T(0));
  std::fill_n(t + K * width, (blocked_steps - K) * width, T(0));
  if (args.inverse)
    recur_backward<true>(chain, h, a, g_ladj, args.param_grads, gamma, t, sums);
  else
    recur_backward<false>(chain, h, a, g_ladj, args.param_grads, gamma, t, sums);
  tile_update(g, static_cast<T*>(args.d_in) + row * D, rows, D, gamma, chain.w, chain.stride, K);
  if (!args.param_grads) return;

  const T* in = static_cast<const T*>(args.in) + row * D;
  for (int64_t i = 0; i < K; i += kBlock) {
    accumulate(sums.gamma_in + i * chain.stride, chain.stride, gamma + i * width, width, in, D,
               rows, D, K - i);
    accumulate(sums.t_g + i * chain.stride, chain.stride, t + i * width, width, g, D, rows, D,
               K - i);
  }
  for (int64_t i = 0; i < K; i += 4)
    for (int64_t j = 0; j <= i; j += 4) {
      T block[16];
      dots_4x4(gamma + i * width, t + j * width, width, width, block);
      T* sum = sums.gamma_t_block(i, j);
      for (int e = 0; e < 16; ++e) sum[e] += block[e];
    }
}

// The parameter gradients from the sums over the batch.
template <class T>
void finish(const PlanarFlowArgs& args, const PlanarChain<T>& chain, const Sums<T>& sums, T* lower,
            T* upper) {
  using V = Vec<T>;
  const int64_t K = chain.K, D = chain.D, padded = chain.padded_steps, stride = chain.stride;
  for (int64_t i = 0; i < padded; ++i)
    for (int64_t j = 0; j < padded; ++j) {
      const bool live = i < K && j < K;
      lower[i * padded + j] = live && j < i ? sums.gamma_t_at(i, j) : T(0);
      upper[i * padded + j] = live && j > i ? sums.gamma_t_at(j, i) : T(0);
    }
  const int64_t block_cycles = kBlock * stride * (K + 8) / V::lanes;
  const int64_t grain = std::max<int64_t>(1, kThreadCycles / block_cycles);
  parallel_for(round_up(K, kBlock) / kBlock, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i0 = begin * kBlock; i0 < std::min(end * kBlock, K); i0 += kBlock) {
      const int64_t i1 = std::min<int64_t>(i0 + kBlock, K);
      accumulate(sums.gamma_in + i0 * stride, stride, lower + i0 * padded, padded, chain.u_hat,
                 stride, i1, D, K - i0);
      accumulate(sums.t_g + i0 * stride, stride, upper + i0 * padded + i0, padded,
                 chain.w + i0 * stride, stride, K - i0, D, K - i0);
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t k = chain.source(i);
        const T* u = static_cast<const T*>(args.u) + k * D;
        const T* w = chain.w + i * stride;
        const T* direct = sums.gamma_in + i * stride;
        const T* du_hat = sums.t_g + i * stride;
        const T g_alpha_n = sum(dot(du_hat, w, D)) * chain.step.inv_n[i];
        const T dp = sum(V::load(sums.dp + i * V::lanes)) + g_alpha_n * chain.step.dm[i];
        const T alpha = chain.step.alpha[i], twice = T(2) * g_alpha_n;
        T* dw = static_cast<T*>(args.dw) + k * D;
        T* du = static_cast<T*>(args.du) + k * D;
        for (int64_t d = 0; d < D; ++d) {
          // (2 g_alpha / n) (alpha w): alpha / n alone overflows for small w
          dw[d] = direct[d] + alpha * du_hat[d] + dp * u[d] - twice * (alpha * w[d]);
          du[d] = du_hat[d] + dp * w[d];
        }
        static_cast<T*>(args.db)[k] = sum(V::load(sums.db + i * V::lanes));
      }
    }
  });
}

template <class T>
struct SumsScratch;

// The batch is cut into chunks whose number depends on sizes only; their sums are added in order,
// so that gradients do not depend on the number of threads.
template <class T>
void backward(const PlanarFlowArgs& args) {
  using Memory = Scratch<PlanarChain<T>>;
  Memory memory(PlanarChain<T>::bytes(args));
  const PlanarChain<T> chain(args, memory, true);
  constexpr int64_t width = kTileRows<T>, max_chunks = 64, max_bytes = int64_t(64) << 20;
  const int64_t size = args.param_grads ? Sums<T>::size(chain) : 0;
  // A power of 2: equal parts for the usual numbers of threads.
  const int64_t cycles = args.batch * row_cycles<T>(args, 4);
  int64_t chunks =
      std::min(max_chunks, int64_t(std::bit_floor(uint64_t(cycles / kThreadCycles + 1))));
  if (size) chunks = std::clamp<int64_t>(max_bytes / int64_t(size * sizeof(T)), 1, chunks);
  const int64_t tiles = (args.batch + width - 1) / width;
  const int64_t tiles_per_chunk = (tiles + chunks - 1) / chunks;
  chunks = (tiles + tiles_per_chunk - 1) / tiles_per_chunk;

  using S = Scratch<SumsScratch<T>>;
  S scratch(S::template bytes<T>(chunks * size) +
            2 * S::template bytes<T>(chain.padded_steps * chain.padded_steps));
  T* all_sums = scratch.template take<T>(chunks * size);
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::fill_n(all_sums + chunk * size, size, T(0));
      const Sums<T> sums(all_sums + chunk * size, chain);
      const int64_t last = std::min(tiles, (chunk + 1) * tiles_per_chunk);
      for (int64_t tile = chunk * tiles_per_chunk; tile < last; ++tile)
        backward_tile(args, chain, tile * width, sums);
    }
  });
  if (!args.param_grads) return;

  constexpr int64_t piece = 512;
  const int64_t grain = std::max<int64_t>(1, kThreadCycles * Vec<T>::lanes / (piece * chunks * 2));
  if (chunks > 1)
    parallel_for((size + piece - 1) / piece, grain, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * piece, size);
      for (int64_t at = begin * piece; at < last; at += piece) {
        const int64_t n = std::min(piece, last - at);
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
          for (int64_t e = 0; e < n; ++e) all_sums[at + e] += all_sums[chunk * size + at + e];
      }
    });
  T* lower = scratch.template take<T>(chain.padded_steps * chain.padded_steps);
  T* upper = scratch.template take<T>(chain.padded_steps * chain.padded_steps);
  finish(args, chain, Sums<T>(all_sums, chain), lower, upper);
}

template <class T>
void forward(const PlanarFlowArgs& args) {
  using Memory = Scratch<PlanarChain<T>>;
  Memory memory(PlanarChain<T>::bytes(args));
  const PlanarChain<T> chain(args, memory, false);
  constexpr int64_t width = kTileRows<T>;
  const int64_t grain = kThreadCycles / (width * row_cycles<T>(args, 2)) + 1;
  parallel_for((args.batch + width - 1) / width, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) forward_tile(args, chain, tile * width);
  });
}

}  // namespace

void planar_flow_shared_forward_cpu(const PlanarFlowArgs& args) {
  args.is_double ? forward<double>(args) : forward<float>(args);
}

void planar_flow_shared_backward_cpu(const PlanarFlowArgs& args) {
  args.is_double ? backward<double>(args) : backward<float>(args);
}

}  // namespace fastflow
