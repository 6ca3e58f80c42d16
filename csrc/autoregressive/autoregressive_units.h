// Elementwise work on the units of a tile, shared by both directions and their backward passes.
#pragma once

#include "autoregressive_activation.h"
#include "autoregressive_tile.h"

namespace fastflow {

// a = act(p) for some units of a tile.
template <class T>
void activate_units(Activation activation, const T* p, int64_t units, int64_t R, int64_t vectors,
                    T* a) {
  constexpr int lanes = Vec<T>::lanes;
  with_activation(activation, [&](auto kind) {
    for (int64_t j = 0; j < units; ++j)
      for (int64_t r = j * R; r < j * R + vectors * lanes; r += lanes)
        activate<kind>(Vec<T>::load(p + r)).store(a + r);
  });
}

// From dA in `d`, the cotangent dP = act'(P) dA plus what skips two levels, and A = act(P), for
// some units of a tile.
template <class T>
void activate_units_backward(Activation activation, const T* p, const T* d_skipped, int64_t units,
                             int64_t R, int64_t vectors, T* d, T* a) {
  constexpr int lanes = Vec<T>::lanes;
  with_activation(activation, [&](auto kind) {
    for (int64_t j = 0; j < units; ++j)
      for (int64_t r = j * R; r < j * R + vectors * lanes; r += lanes) {
        const auto act = activate_with_slope<kind>(Vec<T>::load(p + r));
        Vec<T> sum = Vec<T>::load(d + r) * act.slope;
        if (d_skipped) sum += Vec<T>::load(d_skipped + r);
        sum.store(d + r);
        act.value.store(a + r);
      }
  });
}

// dT = act'(T) dA for the units of a tile.
template <class T>
void slope_units(Activation activation, const T* t, const T* da, int64_t units, int64_t R,
                 int64_t vectors, T* dt) {
  constexpr int lanes = Vec<T>::lanes;
  with_activation(activation, [&](auto kind) {
    for (int64_t j = 0; j < units; ++j)
      for (int64_t r = j * R; r < j * R + vectors * lanes; r += lanes) {
        const auto act = activate_with_slope<kind>(Vec<T>::load(t + r));
        (Vec<T>::load(da + r) * act.slope).store(dt + r);
      }
  });
}

// Columns of `saved` that no vector of the tile reaches.
template <class T>
void clear_unused(T* tile, int64_t units, int64_t R, int64_t used) {
  for (int64_t j = 0; used < R && j < units; ++j)
    std::fill(tile + j * R + used, tile + (j + 1) * R, T(0));
}

}  // namespace fastflow
