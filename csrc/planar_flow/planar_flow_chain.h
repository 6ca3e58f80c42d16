// The parameters of a shared chain, laid out for the row tiles: what does not depend on a row.
#pragma once

#include "../common/blocked.h"
#include "../common/parallel.h"
#include "../common/vector_math.h"
#include "planar_flow.h"
#include "planar_flow_math.h"

namespace fastflow {

template <class T>
Vec<T> dot(const T* x, const T* y, int64_t n) {
  Vec<T> sum(T(0));
  for (int64_t d = 0; d < n; d += Vec<T>::lanes)
    sum += load_up_to(x + d, n - d) * load_up_to(y + d, n - d);
  return sum;
}

// Steps are numbered i = 0 .. K-1 in the order in which the direction that is run applies them.
// Arrays by step have padded_steps = round_up(K, 16) entries, those past K harmless.
template <class T>
struct PlanarChain {
  int64_t K, D, padded_steps, stride;
  bool inverse;
  PlanarStep<T*> step;  // (padded_steps) each
  T* w;                 // (K, stride), zeros in the padding and in rows up to a multiple of 4
  T* u_hat;             // (K, stride), likewise
  T* panels;            // forward: w, backward: u_hat, in panels for tile_dots
  T* products;  // (padded_steps, padded_steps): forward [i][j] = w_i.u_hat_j, backward [j][i]

  static constexpr int fields = 8;

  int64_t source(int64_t i) const { return inverse ? K - 1 - i : i; }

  template <class V>
  PlanarStep<V> at(int64_t i) const {
    return {V(step.s1[i]), V(step.s[i]),  V(step.x[i]),     V(step.root_s[i]),
            V(step.ds[i]), V(step.dm[i]), V(step.alpha[i]), V(step.inv_n[i])};
  }

  static size_t bytes(const PlanarFlowArgs& args) {
    using S = Scratch<PlanarChain>;
    const int64_t padded = round_up(args.steps, 16), stride = padded_stride<T>(args.features);
    return fields * S::template bytes<T>(padded) + 2 * S::template bytes<T>(padded * stride) +
           S::template bytes<T>(padded * args.features) + S::template bytes<T>(padded * padded);
  }

  PlanarChain(const PlanarFlowArgs& args, Scratch<PlanarChain>& scratch, bool backward)
      : K(args.steps),
        D(args.features),
        padded_steps(round_up(K, 16)),
        stride(padded_stride<T>(D)),
        inverse(args.inverse) {
    for (T** field :
         {&step.s1, &step.s, &step.x, &step.root_s, &step.ds, &step.dm, &step.alpha, &step.inv_n})
      *field = scratch.template take<T>(padded_steps);
    w = scratch.template take<T>(padded_steps * stride);
    u_hat = scratch.template take<T>(padded_steps * stride);
    panels = scratch.template take<T>(padded_steps * D);
    products = scratch.template take<T>(padded_steps * padded_steps);

    const int64_t grain = std::max<int64_t>(1, kThreadCycles * Vec<T>::lanes / (8 * stride) / 16);
    parallel_for(padded_steps / 16, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * 16; i < end * 16; i += Vec<T>::lanes) derive(args, i);
    });
    pack_panels(backward ? u_hat : w, stride, K, D, panels);
    const int64_t product_grain = std::max<int64_t>(
        1, kThreadCycles * Vec<T>::lanes / (4 * stride * std::max<int64_t>(K, 8)));
    parallel_for(round_up(K, 4) / 4, product_grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) multiply(4 * i, backward);
    });
  }

 private:
  // Steps i .. i + lanes: their terms and u_hat.
  void derive(const PlanarFlowArgs& args, int64_t i) {
    constexpr int lanes = Vec<T>::lanes;
    T p[lanes] = {}, n[lanes] = {};
    for (int l = 0; l < lanes; ++l) {
      if (i + l >= round_up(K, 4)) break;  // no one looks at the others
      T* row = w + (i + l) * stride;
      const int64_t live = i + l < K ? D : 0;
      std::fill_n(row + live, stride - live, T(0));
      std::fill_n(u_hat + (i + l) * stride + live, stride - live, T(0));
      if (!live) continue;
      const T* u_row = static_cast<const T*>(args.u) + source(i + l) * D;
      std::copy_n(static_cast<const T*>(args.w) + source(i + l) * D, D, row);
      p[l] = sum(dot(row, u_row, D));
      n[l] = sum(dot(row, row, D));
    }
    const auto terms = planar_step(Vec<T>::load(p), Vec<T>::load(n), args.centred);
    terms.s1.store(step.s1 + i);
    terms.s.store(step.s + i);
    terms.x.store(step.x + i);
    terms.root_s.store(step.root_s + i);
    terms.ds.store(step.ds + i);
    terms.dm.store(step.dm + i);
    terms.alpha.store(step.alpha + i);
    terms.inv_n.store(step.inv_n + i);
    for (int l = 0; l < lanes && i + l < K; ++l) {
      const T* u_row = static_cast<const T*>(args.u) + source(i + l) * D;
      const T* w_row = w + (i + l) * stride;
      T* to = u_hat + (i + l) * stride;
      const T alpha = step.alpha[i + l];
      for (int64_t d = 0; d < D; ++d) to[d] = u_row[d] + alpha * w_row[d];
    }
  }

  // w_i.u_hat_j for 4 values of i and all j up to the last of them.
  void multiply(int64_t i0, bool backward) {
    for (int64_t j0 = 0; j0 <= i0; j0 += 4) {
      T block[16];
      dots_4x4(w + i0 * stride, u_hat + j0 * stride, stride, D, block);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
          products[backward ? (j0 + j) * padded_steps + i0 + i : (i0 + i) * padded_steps + j0 + j] =
              block[4 * i + j];
    }
  }
};

}  // namespace fastflow
