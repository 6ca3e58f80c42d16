// The workspace of the kernels for shared parameters, and the sums over the batch.
#pragma once

#include "planar_flow_device.cuh"

namespace fastflow {

// Steps are taken in panels of so many; by K alone, so that a row's bits do not depend on the
// batch.
constexpr int panel_steps(int steps) { return steps <= 8 ? 8 : steps <= 16 ? 16 : 32; }

// The sums over the batch are cut into columns (of D + K: see sums_kernel), steps and rows.
constexpr int kSumThreads = 128;
constexpr int kSumSteps = 16;

// How many threads of a block take different columns; the others take other rows.
constexpr int sum_columns(int64_t columns) {
  int threads = 8;
  while (threads < kSumThreads && threads < columns) threads *= 2;
  return threads;
}

// Pieces of the batch, from the sizes alone: about four blocks for each multiprocessor of a large
// GPU in all, none with fewer than 128 rows. It also bounds the memory of the partial sums.
template <class T>
int64_t batch_pieces(const Chain<T>& chain) {
  const int64_t columns = int64_t(chain.features) + chain.steps;
  const int64_t tiles =
      divide_up<int64_t>(columns, sum_columns(columns)) * divide_up(chain.steps, kSumSteps);
  return smaller(divide_up<int64_t>(512, tiles), divide_up<int64_t>(chain.batch, 128));
}

// Everything that a step is summed over the batch for, t = sigma tanh(a):
//   gamma^T in (D), gamma^T t (K), t^T g (D), sum of gamma, sum of dp.
template <class T>
__host__ __device__ int64_t sums_per_step(const Chain<T>& chain) {
  return 2 * int64_t(chain.features) + chain.steps + 2;
}

// Indices are those of steps, not of visits, but for `products`.
template <class T>
struct SharedWorkspace {
  PlanarStep<T>* step;  // (K)
  T* u_hat;             // (K, D)
  T* products;          // (K, panel): w_i . u_hat_j for the visits j before i in the panel of i
  T* gamma;             // (B, K), backward only, like what follows
  T* dp;                // (B, K)
  T* partial_sums;      // (pieces, K, sums_per_step)
  T* sums;              // (K, sums_per_step)

  size_t bytes = 0;

  SharedWorkspace(const Chain<T>& chain, bool backward, void* workspace) {
    char* const base = static_cast<char*>(workspace);
    const auto take = [&]<class Element>(Element*& pointer, int64_t count) {
      pointer = reinterpret_cast<Element*>(base + bytes);
      bytes += divide_up<size_t>(size_t(count) * sizeof(Element), 256) * 256;
    };
    const int64_t steps = chain.steps;
    take(step, steps);
    take(u_hat, steps * chain.features);
    take(products, steps * panel_steps(chain.steps));
    const bool sums_needed = backward && chain.param_grads;
    take(gamma, sums_needed ? chain.batch * steps : 0);
    take(dp, sums_needed ? chain.batch * steps : 0);
    take(partial_sums, sums_needed ? batch_pieces(chain) * steps * sums_per_step(chain) : 0);
    take(sums, sums_needed ? steps * sums_per_step(chain) : 0);
  }
};

// dw, du, db from gamma and dp of every row.
template <class T>
void shared_param_grads(const Chain<T>& chain, const SharedWorkspace<T>& workspace, Stream& stream);

}  // namespace fastflow
