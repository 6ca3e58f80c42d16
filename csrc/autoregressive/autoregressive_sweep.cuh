// Panels: the few stages of a sweep that go together. The block applies to a panel what came before
// it, in bulk; then a warp takes a row through the panel's stages without waiting for the others.
#pragma once

#include "autoregressive_device.cuh"

namespace fastflow {

constexpr int kSweepThreads = 512;  // at most

// The panel's units of a level are begin .. end - 1. Aligned: one access reads it.
struct alignas(16) PanelLevel {
  int begin;
  int end;
  int local;     // where they are among the panel's units
  int diagonal;  // where the weights that lead to them from within the panel are

  __device__ int width() const { return end - begin; }
};

// In shared memory. A row's values of the panel's units lie together, for the lanes of its warp.
template <class T>
struct Panel {
  T* work;            // (rows, kPanelUnits): P of the inverse, cotangents of its backward
  T* slopes;          // (rows, kPanelUnits), backward only: dA/dP, and what undoes the affine step
  T* diagonal;        // (kPanelWeights)
  T* ladj;            // (rows)
  PanelLevel* level;  // (levels)
  int32_t* bounds;    // (kPanelUnits): prefix, backward start
  int32_t* marks;     // (levels, kPanelStages + 1): the ends from the stage before the panel on

  static __host__ __device__ size_t bytes(int rows, int levels, bool backward) {
    const size_t values = size_t(rows) * (kPanelUnits * (backward ? 2 : 1) + 1) + kPanelWeights;
    const size_t integers = kPanelUnits + levels * (kPanelStages + 1);
    return values * sizeof(T) + levels * sizeof(PanelLevel) + integers * sizeof(int32_t);
  }

  __device__ Panel(const DeviceNetwork<T>& net, bool backward, T* shared) {
    work = shared;
    slopes = work + net.tile_rows * kPanelUnits;
    diagonal = slopes + (backward ? net.tile_rows * kPanelUnits : 0);
    ladj = diagonal + kPanelWeights;
    level = reinterpret_cast<PanelLevel*>(ladj + net.tile_rows);
    bounds = reinterpret_cast<int32_t*>(level + net.levels());
    marks = bounds + kPanelUnits;
  }

  // Loads stages first .. last - 1: `work` and `slopes` are left alone.
  template <bool kBackward>
  __device__ __forceinline__ void load(const DeviceNetwork<T>& net, int first, int last) const {
    PanelLevel below{};
    int weights = 0;
    for (int l = 0; l < net.levels(); ++l) {
      PanelLevel at{net.end(l, first - 1), net.end(l, last - 1), below.local + below.width(),
                    weights};
      if (l) {
        // Forward the columns of the level below times its units, backward the other way round.
        const DeviceLayer<T>& layer = net.layers[l - 1];
        const PanelLevel& outer = kBackward ? at : below;
        const PanelLevel& inner = kBackward ? below : at;
        const int stride = kBackward ? layer.columns : layer.rows, across = inner.width();
        const T* const from = layer.packed + int64_t(outer.begin) * stride + inner.begin;
        for (int i = threadIdx.x; i < outer.width() * across; i += blockDim.x)
          diagonal[weights + i] = from[int64_t(i / across) * stride + i % across];
        for (int i = threadIdx.x; i < across; i += blockDim.x)
          bounds[inner.local + i] =
              kBackward ? layer.start[inner.begin + i] : layer.prefix[inner.begin + i];
        weights += outer.width() * across;
      }
      if (threadIdx.x == 0) level[l] = at;
      for (int i = threadIdx.x; i <= last - first; i += blockDim.x)
        marks[l * (kPanelStages + 1) + i] = net.end(l, first - 1 + i);
      below = at;
    }
  }

  // end() of a stage of the panel that begins with stage `first`, or of the one before it.
  __device__ int mark(int l, int s, int first) const {
    return marks[l * (kPanelStages + 1) + s - first + 1];
  }
};

}  // namespace fastflow
