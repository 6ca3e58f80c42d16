// Planar chains with parameters of their own for every row. The work is reading w and u (backward:
// and writing dw, du), each once: vectors run along the features of a row, and the dot products of
// a group of rows are turned into lanes, where the scalar mathematics of the group is done at once.
#include "../common/blocked.h"
#include "../common/parallel.h"
#include "../common/vector_math.h"
#include "planar_flow_cpu.h"
#include "planar_flow_math.h"

namespace fastflow {
namespace {

template <class T>
struct GroupScratch;

// A group of up to two vectors of rows, whose long dependent computations overlap. Where
// rows are long fewer of them are taken, so that w and u are still in cache when a step comes back
// to them. Quantities of one number a row and step are kept "by step", x[k * width + row].
template <class T>
struct Group {
  static constexpr int lanes = Vec<T>::lanes, width = 2 * lanes;
  int64_t first, count;  // rows
  int64_t D, K;
  bool inverse;

  static int64_t size(int64_t D) { return std::clamp<int64_t>(16384 / D, 1, width); }

  int64_t source(int64_t i) const { return inverse ? K - 1 - i : i; }
  int64_t at(int64_t r, int64_t k) const { return (first + r) * K + k; }
  int halves() const { return count > lanes ? 2 : 1; }

  // From a (B, K) tensor to values by step, and back.
  void gather(const void* values, T* x) const {
    transpose_in(static_cast<const T*>(values) + first * K, K, count, K, x, width);
  }
  void scatter(const T* x, void* values) const {
    transpose_out(x, width, K, static_cast<T*>(values) + first * K, K, count);
  }
  // Rows of a (B, D) tensor into padded rows, and back.
  void load_rows(const void* rows, T* x, int64_t stride) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < D; d += lanes)
        load_up_to(static_cast<const T*>(rows) + (first + r) * D + d, D - d)
            .store(x + r * stride + d);
  }
  void store_rows(const T* x, int64_t stride, void* rows) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < D; d += lanes)
        store_up_to(Vec<T>::load(x + r * stride + d), static_cast<T*>(rows) + (first + r) * D + d,
                    D - d);
  }
};

// f(d, load, store) for the whole vectors of a row and for its tail, if there is one.
template <class T, class F>
FASTFLOW_HD void for_vectors(int64_t D, const F& f) {
  constexpr int lanes = Vec<T>::lanes;
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes)
    f(d, [](const T* p) { return Vec<T>::load(p); }, [](Vec<T> x, T* p) { x.store(p); });
  if (const int tail = int(D - d))
    f(
        d, [tail](const T* p) { return load_partial(p, tail); },
        [tail](Vec<T> x, T* p) { store_partial(x, p, tail); });
}

// The sums of the lanes of rows h * lanes ... of a group, as lanes.
template <class T>
FASTFLOW_HD Vec<T> sum_lanes(const Vec<T> (&rows)[Group<T>::width], int h) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> half[lanes];
#pragma GCC unroll 16
  for (int r = 0; r < lanes; ++r) half[r] = rows[h * lanes + r];
  return sum_each(half);
}

// Asks for the parameters of a row's next step while this one is computed. Hardware follows a few
// streams, a group has dozens; long rows it follows well.
template <bool Write = false, class T>
FASTFLOW_HD void prefetch_row(const T* row, int64_t D) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  if (D <= 8 * line)
    for (int64_t d = 0; d < D; d += line) __builtin_prefetch(row + d, Write);
}

template <bool Inverse, class T>
void forward_group(const PlanarFlowArgs& args, const Group<T>& group) {
  using V = Vec<T>;
  using S = Scratch<GroupScratch<T>>;
  constexpr int lanes = V::lanes, width = Group<T>::width;
  const int64_t D = group.D, K = group.K, stride = padded_stride<T>(D), steps = round_up(K, lanes);
  S scratch(S::template bytes<T>(width * stride) + S::template bytes<T>(steps * width));
  T* x = scratch.template take<T>(width * stride);
  T* a = scratch.template take<T>(steps * width);  // b until step k has run
  group.load_rows(args.in, x, stride);
  group.gather(args.b, a);

  PlanarLadjSum<V> sums[2];
  for (int64_t i = 0; i < K; ++i) {
    const int64_t k = group.source(i);
    V wx[width], wu[width], ww[width];
    for (int64_t r = 0; r < width; ++r) {
      wx[r] = wu[r] = ww[r] = V(T(0));
      if (r >= group.count) continue;
      const T* w_row = static_cast<const T*>(args.w) + group.at(r, k) * D;
      const T* u_row = static_cast<const T*>(args.u) + group.at(r, k) * D;
      const T* x_row = x + r * stride;
      if (i + 1 < K) {
        const int64_t next = (group.source(i + 1) - k) * D;
        prefetch_row(w_row + next, D);
        prefetch_row(u_row + next, D);
      }
      V sum_wx(T(0)), sum_wu(T(0)), sum_ww(T(0));
      for_vectors<T>(D, [&](int64_t d, auto load, auto) {
        const V w = load(w_row + d), u = load(u_row + d);
        sum_wx += w * V::load(x_row + d);
        sum_wu += w * u;
        sum_ww += w * w;
      });
      wx[r] = sum_wx, wu[r] = sum_wu, ww[r] = sum_ww;
    }
    T t[width], alpha[width];
#pragma GCC unroll 1  // one piece of code, so that both vectors' roundings are the same
    for (int h = 0; h < group.halves(); ++h) {
      const auto step = planar_step(sum_lanes(wu, h), sum_lanes(ww, h), args.centred);
      T* a_k = a + k * width + h * lanes;
      const V r = sum_lanes(wx, h) + V::load(a_k);
      const V pre = Inverse ? planar_solve(r, step) : r;
      const auto tanh_a = planar_tanh(pre);
      sums[h].add(tanh_a, step);
      pre.store(a_k);
      copysign(tanh_a.t, Inverse ? -pre : pre).store(t + h * lanes);
      step.alpha.store(alpha + h * lanes);
    }
    for (int64_t r = 0; r < group.count; ++r) {
      const T* w_row = static_cast<const T*>(args.w) + group.at(r, k) * D;
      const T* u_row = static_cast<const T*>(args.u) + group.at(r, k) * D;
      T* x_row = x + r * stride;
      const V t_r(t[r]), alpha_r(alpha[r]);
      for_vectors<T>(D, [&](int64_t d, auto load, auto) {
        const V u_hat = load(u_row + d) + alpha_r * load(w_row + d);
        (V::load(x_row + d) + t_r * u_hat).store(x_row + d);
      });
    }
  }
  group.store_rows(x, stride, args.out);
  group.scatter(a, args.a);
  T ladj[width];
#pragma GCC unroll 1
  for (int h = 0; h < 2; ++h)
    (Inverse ? -sums[h].total() : sums[h].total()).store(ladj + h * lanes);
  std::copy_n(ladj, group.count, static_cast<T*>(args.ladj) + group.first);
}

// What the second pass over a row's step needs to know.
template <class T>
struct RowTerms {
  static constexpr int width = Group<T>::width;
  T alpha[width], t[width], gamma[width], dp[width], twice_g_alpha_n[width];
};

// The second pass: rebuilds the state before the step, writes dw and du, and moves g over the step.
template <bool ParamGrads, class T>
FASTFLOW_HD void backward_row(const PlanarFlowArgs& args, const RowTerms<T>& terms, int64_t r,
                              int64_t offset, int64_t D, T* x_row, T* g_row) {
  using V = Vec<T>;
  const T* w_row = static_cast<const T*>(args.w) + offset;
  const T* u_row = static_cast<const T*>(args.u) + offset;
  // null pointers are not moved
  T* dw_row = ParamGrads ? static_cast<T*>(args.dw) + offset : nullptr;
  T* du_row = ParamGrads ? static_cast<T*>(args.du) + offset : nullptr;
  const V alpha(terms.alpha[r]), t(terms.t[r]), gamma(terms.gamma[r]), dp(terms.dp[r]);
  const V twice_g_alpha_n(terms.twice_g_alpha_n[r]);
  for_vectors<T>(D, [&](int64_t d, auto load, auto store) {
    const V w = load(w_row + d), g = V::load(g_row + d);
    if constexpr (ParamGrads) {
      const V u = load(u_row + d), alpha_w = alpha * w;
      const V x = V::load(x_row + d) - t * (u + alpha_w);
      const V du_hat = t * g;
      x.store(x_row + d);
      store(((gamma * x + alpha * du_hat) + dp * u) - twice_g_alpha_n * alpha_w, dw_row + d);
      store(du_hat + dp * w, du_row + d);
    }
    (g + gamma * w).store(g_row + d);
  });
}

template <bool Inverse, bool ParamGrads, class T>
void backward_group(const PlanarFlowArgs& args, const Group<T>& group) {
  using V = Vec<T>;
  using S = Scratch<GroupScratch<T>>;
  constexpr int lanes = V::lanes, width = Group<T>::width;
  const int64_t D = group.D, K = group.K, stride = padded_stride<T>(D), steps = round_up(K, lanes);
  S scratch(2 * S::template bytes<T>(width * stride) + 2 * S::template bytes<T>(steps * width));
  T* g = scratch.template take<T>(width * stride);
  T* x = scratch.template take<T>(width * stride);
  T* a = scratch.template take<T>(steps * width);
  T* db = scratch.template take<T>(steps * width);
  group.load_rows(args.d_out, g, stride);
  if constexpr (ParamGrads) group.load_rows(args.out, x, stride);
  group.gather(args.a, a);
  T g_ladj[width] = {};
  for (int64_t r = 0; r < group.count; ++r) {
    const T value = static_cast<const T*>(args.dladj)[group.first + r];
    g_ladj[r] = Inverse ? -value : value;
  }

  for (int64_t i = K - 1; i >= 0; --i) {
    const int64_t k = group.source(i);
    V wu[width], ww[width], ug[width], wg[width];
    for (int64_t r = 0; r < width; ++r) {
      wu[r] = ww[r] = ug[r] = wg[r] = V(T(0));
      if (r >= group.count) continue;
      const T* w_row = static_cast<const T*>(args.w) + group.at(r, k) * D;
      const T* u_row = static_cast<const T*>(args.u) + group.at(r, k) * D;
      const T* g_row = g + r * stride;
      if (i > 0) {
        const int64_t next = (group.source(i - 1) - k) * D;
        prefetch_row(w_row + next, D);
        prefetch_row(u_row + next, D);
        if constexpr (ParamGrads) {
          prefetch_row<true>(static_cast<T*>(args.dw) + group.at(r, k) * D + next, D);
          prefetch_row<true>(static_cast<T*>(args.du) + group.at(r, k) * D + next, D);
        }
      }
      V sum_wu(T(0)), sum_ww(T(0)), sum_ug(T(0)), sum_wg(T(0));
      for_vectors<T>(D, [&](int64_t d, auto load, auto) {
        const V w = load(w_row + d), u = load(u_row + d), g_d = V::load(g_row + d);
        sum_wu += w * u;
        sum_ww += w * w;
        sum_ug += u * g_d;
        sum_wg += w * g_d;
      });
      wu[r] = sum_wu, ww[r] = sum_ww, ug[r] = sum_ug, wg[r] = sum_wg;
    }
    RowTerms<T> terms;
#pragma GCC unroll 1  // see forward_group
    for (int half = 0; half < group.halves(); ++half) {
      const int64_t at = half * lanes;
      const auto step = planar_step(sum_lanes(wu, half), sum_lanes(ww, half), args.centred);
      const V pre = V::load(a + k * width + at), g_ladj_h = V::load(g_ladj + at);
      const V w_g = sum_lanes(wg, half);
      const V h = sum_lanes(ug, half) + step.alpha * w_g;  // u_hat . g
      const auto pull = pull_back(pre, h, g_ladj_h, step, Inverse);
      const V g_alpha_n = pull.t * w_g * step.inv_n;
      step.alpha.store(terms.alpha + at);
      pull.t.store(terms.t + at);
      pull.gamma.store(terms.gamma + at);
      pull.gamma.store(db + k * width + at);
      (pull.dp + g_alpha_n * step.dm).store(terms.dp + at);
      (g_alpha_n + g_alpha_n).store(terms.twice_g_alpha_n + at);
    }
    for (int64_t r = 0; r < group.count; ++r)
      backward_row<ParamGrads>(args, terms, r, group.at(r, k) * D, D, x + r * stride,
                               g + r * stride);
  }
  group.store_rows(g, stride, args.d_in);
  if constexpr (ParamGrads) group.scatter(db, args.db);
}

// run(group) for all groups of the batch; a group's result does not depend on how rows are grouped.
template <class T, class F>
void for_groups(const PlanarFlowArgs& args, int64_t cycles_per_vector, const F& run) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const int64_t D = args.features, K = args.steps, size = Group<T>::size(D);
  const int64_t vectors = (D + lanes - 1) / lanes;
  const int64_t cycles = K * (size * (cycles_per_vector * vectors + 10) + 200);
  parallel_for(
      (args.batch + size - 1) / size, kThreadCycles / cycles + 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          run(Group<T>{i * size, std::min(size, args.batch - i * size), D, K, args.inverse});
      });
}

template <class T>
void forward(const PlanarFlowArgs& args) {
  for_groups<T>(args, 8, [&](const Group<T>& group) {
    args.inverse ? forward_group<true>(args, group) : forward_group<false>(args, group);
  });
}

template <class T>
void backward(const PlanarFlowArgs& args) {
  for_groups<T>(args, 16, [&](const Group<T>& group) {
    if (args.inverse)
      args.param_grads ? backward_group<true, true>(args, group)
                       : backward_group<true, false>(args, group);
    else
      args.param_grads ? backward_group<false, true>(args, group)
                       : backward_group<false, false>(args, group);
  });
}

}  // namespace

void planar_flow_amortised_forward_cpu(const PlanarFlowArgs& args) {
  args.is_double ? forward<double>(args) : forward<float>(args);
}

void planar_flow_amortised_backward_cpu(const PlanarFlowArgs& args) {
  args.is_double ? backward<double>(args) : backward<float>(args);
}

}  // namespace fastflow
