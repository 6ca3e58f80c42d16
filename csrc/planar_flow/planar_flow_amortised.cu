// planar_flow with parameters of its own for every row: w, u (B, K, D), b (B, K).
//
// The work is moving w and u, so each is read once. A group of threads holds a row z (and,
// backward, its cotangent g) in registers: a part of a warp up to D = 256, a block up to D = 4096
// (half of that for double). While a step computes, the loads of the next one are under way. All
// that a step needs to know of D elements is three sums forward (w.z, w.u, w.w) and four backward
// (w.u, w.w, w.g, u.g), taken together. Wider rows stay in memory, that is, in the cache.
#include <type_traits>

#include "planar_flow_device.cuh"

namespace fastflow {
namespace {

constexpr int kThreads = 128;      // of a block that holds several rows
constexpr int kWideThreads = 256;  // of a block that walks along one wide row
constexpr int kWideBlocks = 2;     // of these on a multiprocessor at least

// Quads of each row that a thread holds: rows of w, u, their successors, x and g fit in registers.
template <class T>
constexpr int kQuads = sizeof(T) == 4 ? 2 : 1;

// A thread's part of a row in registers. Quads of the group's threads alternate, so that each
// access of the group is contiguous.
template <class T, int kLanes>
struct RowPart {
  T v[4 * kQuads<T>];

  static __device__ __forceinline__ int first(int lane, int quad) {
    return 4 * (quad * kLanes + lane);
  }
  __device__ __forceinline__ void load(const T* row, int lane, const Chain<T>& chain) {
#pragma unroll
    for (int i = 0; i < kQuads<T>; ++i) {
      const int d = first(lane, i);
      const Quad<T> quad = load_quad(row + d, chain.features - d, chain.aligned);
#pragma unroll
      for (int e = 0; e < 4; ++e) v[4 * i + e] = quad.v[e];
    }
  }
  __device__ __forceinline__ void store(T* row, int lane, const Chain<T>& chain) const {
#pragma unroll
    for (int i = 0; i < kQuads<T>; ++i) {
      const int d = first(lane, i);
      Quad<T> quad;
#pragma unroll
      for (int e = 0; e < 4; ++e) quad.v[e] = v[4 * i + e];
      store_quad(row + d, quad, chain.features - d, chain.aligned);
    }
  }
  friend __device__ __forceinline__ T dot(const RowPart& a, const RowPart& b) {
    T sum = 0;
#pragma unroll
    for (int e = 0; e < 4 * kQuads<T>; ++e) sum += a.v[e] * b.v[e];
    return sum;
  }
};

template <class T, int kLanes>
__global__ void __launch_bounds__(kLanes > kThreads ? kLanes : kThreads)
    forward_kernel(const Chain<T> chain) {
  const int lane = threadIdx.x % kLanes;
  const int64_t group = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const bool exists = group < chain.batch;
  const int64_t row = exists ? group : chain.batch - 1;  // idle groups follow, for the shuffles
  const int steps = chain.steps, features = chain.features;
  const int64_t first = row * steps;
  T* const scratch = shared_memory<T>();

  RowPart<T, kLanes> x, w, u, next_w, next_u;
  x.load(chain.in + row * features, lane, chain);
  w.load(chain.w + (first + chain.step_at(0)) * features, lane, chain);
  u.load(chain.u + (first + chain.step_at(0)) * features, lane, chain);

  // L is off the chain of dependences: lane i keeps what the i-th step has for it, and the lanes
  // evaluate their steps together, kLanes at a time.
  T ladj[1] = {0};
  T kept_a = 0;
  PlanarStep<T> kept{};

  for (int i = 0; i < steps; ++i) {
    const int64_t k = first + chain.step_at(i);
    const T b = chain.b[k];
    if (i + 1 < steps) {
      const int64_t next = first + chain.step_at(i + 1);
      next_w.load(chain.w + next * features, lane, chain);
      next_u.load(chain.u + next * features, lane, chain);
    }
    T sums[3] = {dot(w, x), dot(w, u), dot(w, w)};
    group_sum<kLanes>(sums, scratch, i);
    const PlanarStep<T> step = planar_step(sums[1], sums[2], chain.centred);
    const T a = pre_activation(sums[0] + b, step, chain.inverse);
    const T t = chain.sigma() * signed_tanh(a);
#pragma unroll
    for (int e = 0; e < 4 * kQuads<T>; ++e) x.v[e] += t * (u.v[e] + step.alpha * w.v[e]);

    const int turn = i % kLanes;
    if (lane == turn) kept_a = a, kept = step;
    if ((turn == kLanes - 1 || i == steps - 1) && lane <= turn) {
      ladj[0] += planar_ladj(planar_tanh(kept_a), kept);
      if (exists) chain.a[first + chain.step_at(i - turn + lane)] = kept_a;
    }
    w = next_w, u = next_u;
  }
  group_sum<kLanes>(ladj, scratch, steps);
  if (!exists) return;
  x.store(chain.out + row * features, lane, chain);
  if (lane == 0) chain.ladj[row] = chain.sigma() * ladj[0];
}

// Runs the chain from its output back: x is rebuilt on the way, g becomes the cotangent of each
// state in turn.
template <class T, int kLanes>
__global__ void __launch_bounds__(kLanes > kThreads ? kLanes : kThreads)
    backward_kernel(const Chain<T> chain) {
  const int lane = threadIdx.x % kLanes;
  const int64_t group = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const bool exists = group < chain.batch;
  const int64_t row = exists ? group : chain.batch - 1;
  const int steps = chain.steps, features = chain.features;
  const int64_t first = row * steps;
  T* const scratch = shared_memory<T>();
  const T g_ladj = chain.sigma() * chain.dladj[row];

  RowPart<T, kLanes> x, g, w, u, next_w, next_u;
  x.load(chain.out + row * features, lane, chain);
  g.load(chain.d_out + row * features, lane, chain);
  w.load(chain.w + (first + chain.step_at(steps - 1)) * features, lane, chain);
  u.load(chain.u + (first + chain.step_at(steps - 1)) * features, lane, chain);

  for (int i = steps - 1; i >= 0; --i) {
    const int64_t k = first + chain.step_at(i);
    const T a = chain.a[k];
    if (i > 0) {
      const int64_t next = first + chain.step_at(i - 1);
      next_w.load(chain.w + next * features, lane, chain);
      next_u.load(chain.u + next * features, lane, chain);
    }
    T sums[4] = {dot(w, u), dot(w, w), dot(w, g), dot(u, g)};
    group_sum<kLanes>(sums, scratch, i);
    const PlanarStep<T> step = planar_step(sums[0], sums[1], chain.centred);
    const T h = sums[3] + step.alpha * sums[2];
    const PlanarPullback<T> pull = pull_back(a, h, g_ladj, step, chain.inverse);

    if (chain.param_grads) {
      const T t = pull.t;
      const T g_alpha_n = t * sums[2] * step.inv_n;
      const T dp = pull.dp + g_alpha_n * step.dm;
      RowPart<T, kLanes> dw, du;
#pragma unroll
      for (int e = 0; e < 4 * kQuads<T>; ++e) {
        const T alpha_w = step.alpha * w.v[e];
        const T du_hat = t * g.v[e];
        x.v[e] -= t * (u.v[e] + alpha_w);
        dw.v[e] = pull.gamma * x.v[e] + step.alpha * du_hat + dp * u.v[e] - 2 * g_alpha_n * alpha_w;
        du.v[e] = du_hat + dp * w.v[e];
      }
      if (exists) {
        dw.store(chain.dw + k * features, lane, chain);
        du.store(chain.du + k * features, lane, chain);
        if (lane == 0) chain.db[k] = pull.gamma;
      }
    }
#pragma unroll
    for (int e = 0; e < 4 * kQuads<T>; ++e) g.v[e] += pull.gamma * w.v[e];
    w = next_w, u = next_u;
  }
  if (exists) g.store(chain.d_in + row * features, lane, chain);
}

// A block walks along a row of any width, whose state lives in `out`. A thread meets the same
// elements on every walk: only the sums need a barrier.
template <class T>
__global__ void __launch_bounds__(kWideThreads, kWideBlocks)
    wide_forward_kernel(const Chain<T> chain) {
  const int64_t row = blockIdx.x;
  const int steps = chain.steps, features = chain.features;
  T* const out = chain.out + row * features;
  T ladj = 0;
  for (int i = 0; i < steps; ++i) {
    const int64_t k = row * steps + chain.step_at(i);
    const T* const w = chain.w + k * features;
    const T* const u = chain.u + k * features;
    const T* const x = i == 0 ? chain.in + row * features : out;
    T sums[3] = {0, 0, 0};
#pragma unroll 4
    for (int d = threadIdx.x; d < features; d += kWideThreads) {
      const T w_d = w[d];
      sums[0] += w_d * x[d];
      sums[1] += w_d * u[d];
      sums[2] += w_d * w_d;
    }
    group_sum<kWideThreads>(sums, shared_memory<T>(), i);
    const PlanarStep<T> step = planar_step(sums[1], sums[2], chain.centred);
    const T a = pre_activation(sums[0] + chain.b[k], step, chain.inverse);
    const T t = chain.sigma() * signed_tanh(a);
#pragma unroll 4
    for (int d = threadIdx.x; d < features; d += kWideThreads)
      out[d] = x[d] + t * (u[d] + step.alpha * w[d]);
    ladj += planar_ladj(planar_tanh(a), step);
    if (threadIdx.x == 0) chain.a[k] = a;
  }
  if (threadIdx.x == 0) chain.ladj[row] = chain.sigma() * ladj;
}

// g lives in `d_in`. The state before step i waits in the place of dw of step i - 1, which its own
// gradient overwrites when its turn has come.
template <class T>
__global__ void __launch_bounds__(kWideThreads, kWideBlocks)
    wide_backward_kernel(const Chain<T> chain) {
  const int64_t row = blockIdx.x;
  const int steps = chain.steps, features = chain.features;
  const T g_ladj = chain.sigma() * chain.dladj[row];
  T* const d_in = chain.d_in + row * features;
  for (int i = steps - 1; i >= 0; --i) {
    const int64_t k = row * steps + chain.step_at(i);
    const T* const w = chain.w + k * features;
    const T* const u = chain.u + k * features;
    const T* const g = i == steps - 1 ? chain.d_out + row * features : d_in;
    T sums[4] = {0, 0, 0, 0};
#pragma unroll 4
    for (int d = threadIdx.x; d < features; d += kWideThreads) {
      const T w_d = w[d], u_d = u[d], g_d = g[d];
      sums[0] += w_d * u_d;
      sums[1] += w_d * w_d;
      sums[2] += w_d * g_d;
      sums[3] += u_d * g_d;
    }
    group_sum<kWideThreads>(sums, shared_memory<T>(), i);
    const T a = chain.a[k];
    const PlanarStep<T> step = planar_step(sums[0], sums[1], chain.centred);
    const T h = sums[3] + step.alpha * sums[2];
    const PlanarPullback<T> pull = pull_back(a, h, g_ladj, step, chain.inverse);

    if (chain.param_grads) {
      const T t = pull.t;
      const T g_alpha_n = t * sums[2] * step.inv_n;
      const T dp = pull.dp + g_alpha_n * step.dm;
      T* const dw = chain.dw + k * features;
      T* const du = chain.du + k * features;
      const T* const after = i == steps - 1 ? chain.out + row * features : dw;
      T* const before =
          i == 0 ? nullptr : chain.dw + (row * steps + chain.step_at(i - 1)) * features;
      for (int d = threadIdx.x; d < features; d += kWideThreads) {
        const T alpha_w = step.alpha * w[d];
        const T du_hat = t * g[d];
        const T x = after[d] - t * (u[d] + alpha_w);
        if (before) before[d] = x;
        dw[d] = pull.gamma * x + step.alpha * du_hat + dp * u[d] - 2 * g_alpha_n * alpha_w;
        du[d] = du_hat + dp * w[d];
      }
      if (threadIdx.x == 0) chain.db[k] = pull.gamma;
    }
    for (int d = threadIdx.x; d < features; d += kWideThreads) d_in[d] = g[d] + pull.gamma * w[d];
  }
}

// Calls f with the number of threads that hold a row of D elements, or with 0 where none do.
template <class T, class F>
void with_lanes(int features, const F& f) {
  const int needed = divide_up(features, 4 * kQuads<T>);
  const auto call = [&](auto lanes) { f(lanes); };
  if (needed <= 1)
    call(std::integral_constant<int, 1>{});
  else if (needed <= 4)
    call(std::integral_constant<int, 4>{});
  else if (needed <= 8)
    call(std::integral_constant<int, 8>{});
  else if (needed <= 16)
    call(std::integral_constant<int, 16>{});
  else if (needed <= 32)
    call(std::integral_constant<int, 32>{});
  else if (needed <= 128)
    call(std::integral_constant<int, 128>{});
  else if (needed <= 512)
    call(std::integral_constant<int, 512>{});
  else
    call(std::integral_constant<int, 0>{});
}

}  // namespace

template <class T>
void amortised(bool backward, const Chain<T>& chain, Stream& stream) {
  with_lanes<T>(chain.features, [&](auto lanes) {
    constexpr int kLanes = lanes;
    if constexpr (kLanes == 0) {
      const size_t scratch = group_sum_bytes<T>(kWideThreads);
      stream.launch(backward ? wide_backward_kernel<T> : wide_forward_kernel<T>,
                    unsigned(chain.batch), kWideThreads, scratch, chain);
    } else {
      constexpr int block = kLanes > kThreads ? kLanes : kThreads;
      const unsigned grid = unsigned(divide_up<int64_t>(chain.batch, block / kLanes));
      stream.launch(backward ? backward_kernel<T, kLanes> : forward_kernel<T, kLanes>, grid, block,
                    group_sum_bytes<T>(kLanes), chain);
    }
  });
}

template void amortised(bool, const Chain<float>&, Stream&);
template void amortised(bool, const Chain<double>&, Stream&);

}  // namespace fastflow
