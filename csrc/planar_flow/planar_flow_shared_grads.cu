// Gradients of shared parameters: sums over the batch, in a fixed order and without atomics.
//
// With gamma and dp of every row and step (planar_flow_shared.cu), t = sigma tanh(a), and g the
// cotangent of the chain's output, the states and cotangents inside the chain need not be rebuilt:
//
//   dw_k     = gamma_k^T in + sum_{j before k} (gamma_k^T t_j) u_hat_j
//   du_hat_k = t_k^T g    + sum_{j after k}  (gamma_j^T t_k) w_j
#include "planar_flow_shared.cuh"

namespace fastflow {
namespace {

constexpr int kSumBlocks = 2;  // on a multiprocessor at least
constexpr int kStagedRows = 32;
constexpr int kReduceWidth = 32;
constexpr int kReduceThreads = 256;
constexpr int kFinishThreads = 256;

template <class T>
constexpr size_t sum_shared_bytes() {
  return sizeof(T) * kSumSteps * (kSumThreads > 2 * kStagedRows ? kSumThreads : 2 * kStagedRows);
}

// Grid: (column tiles, step tiles, pieces of the batch). A thread owns a column c of [in | t] and
// of [g], and every (kSumThreads / columns)-th row: gamma^T [in | t] and t^T g for kSumSteps
// steps in its registers. Column c >= D is t of step c - D.
template <class T>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    sums_kernel(const Chain<T> chain, const SharedWorkspace<T> workspace, int columns) {
  T* const gamma_tile = shared_memory<T>();                // (rows, kSumSteps)
  T* const t_tile = gamma_tile + kStagedRows * kSumSteps;  // (rows, kSumSteps)
  const int features = chain.features, steps = chain.steps;
  const int64_t c = int64_t(blockIdx.x) * columns + threadIdx.x % columns;
  const int slice = threadIdx.x / columns, slices = kSumThreads / columns;
  const int first = blockIdx.y * kSumSteps;
  const int64_t per_piece = divide_up<int64_t>(chain.batch, gridDim.z);
  const int64_t end = smaller(chain.batch, (blockIdx.z + 1) * per_piece);

  T with_gamma[kSumSteps] = {}, with_t[kSumSteps] = {};
  T scalar = 0;  // threads below 2 kSumSteps of the first column tile: sum of a step's gamma or dp
  const int scalar_step = first + threadIdx.x % kSumSteps;
  const bool has_scalar = blockIdx.x == 0 && threadIdx.x < 2 * kSumSteps && scalar_step < steps;
  const T* const scalars = threadIdx.x < kSumSteps ? workspace.gamma : workspace.dp;

  for (int64_t row = blockIdx.z * per_piece; row < end; row += kStagedRows) {
    const int rows = int(smaller<int64_t>(kStagedRows, end - row));
    __syncthreads();
    for (int index = threadIdx.x; index < kStagedRows * kSumSteps; index += kSumThreads) {
      const int r = index / kSumSteps, k = first + index % kSumSteps;
      const bool exists = r < rows && k < steps;
      const int64_t at = (row + r) * steps + k;
      gamma_tile[index] = exists ? workspace.gamma[at] : T(0);
      t_tile[index] = exists ? chain.sigma() * signed_tanh(chain.a[at]) : T(0);
    }
    __syncthreads();
    if (has_scalar)
      for (int r = 0; r < rows; ++r) scalar += scalars[(row + r) * steps + scalar_step];
#pragma unroll 4
    for (int r = slice; r < rows; r += slices) {
      T x = 0, g = 0;
      if (c < features) {
        x = chain.in[(row + r) * features + c];
        g = chain.d_out[(row + r) * features + c];
      } else if (c < features + steps) {
        x = chain.sigma() * signed_tanh(chain.a[(row + r) * steps + (c - features)]);
      }
#pragma unroll
      for (int s = 0; s < kSumSteps; s += 4) {
        const int at = r * kSumSteps + s;
        const Quad<T> gamma = *reinterpret_cast<const Quad<T>*>(gamma_tile + at);
        const Quad<T> t = *reinterpret_cast<const Quad<T>*>(t_tile + at);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          with_gamma[s + e] += gamma.v[e] * x;
          with_t[s + e] += t.v[e] * g;
        }
      }
    }
  }

  // Slices of a column add up in the memory of the tiles; the first slice stores.
  T* const exchange = shared_memory<T>();  // (kSumSteps, kSumThreads)
  const int64_t width = sums_per_step(chain);
  T* const partial = workspace.partial_sums + (int64_t(blockIdx.z) * steps + first) * width;
  const auto store = [&](const T(&sums)[kSumSteps], int64_t offset, int64_t limit) {
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSumSteps; ++s) exchange[s * kSumThreads + threadIdx.x] = sums[s];
    __syncthreads();
    if (slice != 0 || c >= limit) return;
    for (int s = 0; s < kSumSteps && first + s < steps; ++s) {
      T sum = 0;
      for (int i = 0; i < slices; ++i) sum += exchange[s * kSumThreads + i * columns + threadIdx.x];
      partial[s * width + offset + c] = sum;
    }
  };
  store(with_gamma, 0, int64_t(features) + steps);
  store(with_t, int64_t(features) + steps, features);
  if (has_scalar)
    partial[(scalar_step - first) * width + width - 2 + threadIdx.x / kSumSteps] = scalar;
}

// sums = partial_sums over the pieces: a column of the block's threads shares an element.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const T* partial, T* sums, int64_t elements, int pieces) {
  T* const exchange = shared_memory<T>();  // (kReduceThreads)
  const int64_t element = int64_t(blockIdx.x) * kReduceWidth + threadIdx.x % kReduceWidth;
  T sum = 0;
  if (element < elements)
#pragma unroll 4
    for (int i = threadIdx.x / kReduceWidth; i < pieces; i += kReduceThreads / kReduceWidth)
      sum += partial[i * elements + element];
  exchange[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kReduceWidth || element >= elements) return;
  for (int i = kReduceWidth; i < kReduceThreads; i += kReduceWidth)
    sum += exchange[i + threadIdx.x];
  sums[element] = sum;
}

// Block k: the gradients of step k, through u_hat = u + alpha w.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const Chain<T> chain, const SharedWorkspace<T> workspace) {
  const int features = chain.features, steps = chain.steps, k = blockIdx.x;
  const int visit = chain.step_at(k);
  const int64_t width = sums_per_step(chain);
  const T* const own = workspace.sums + k * width;
  const T* const w = chain.w + int64_t(k) * features;
  const T* const u = chain.u + int64_t(k) * features;
  T* const dw = chain.dw + int64_t(k) * features;
  T* const du = chain.du + int64_t(k) * features;

  T g_alpha[1] = {0};
  for (int d = threadIdx.x; d < features; d += kFinishThreads) {
    T du_hat = own[features + steps + d];
#pragma unroll 4
    for (int i = visit + 1; i < steps; ++i) {
      const int64_t j = chain.step_at(i);
      du_hat += workspace.sums[j * width + features + k] * chain.w[j * features + d];
    }
    du[d] = du_hat;
    g_alpha[0] += du_hat * w[d];
  }
  group_sum<kFinishThreads>(g_alpha, shared_memory<T>(), 0);

  const PlanarStep<T> step = workspace.step[k];
  const T g_alpha_n = g_alpha[0] * step.inv_n;
  const T dp = own[width - 1] + g_alpha_n * step.dm;
  for (int d = threadIdx.x; d < features; d += kFinishThreads) {
    T direct = own[d];
#pragma unroll 4
    for (int i = 0; i < visit; ++i) {
      const int64_t j = chain.step_at(i);
      direct += own[features + j] * workspace.u_hat[j * features + d];
    }
    const T du_hat = du[d], alpha_w = step.alpha * w[d];
    dw[d] = direct + step.alpha * du_hat + dp * u[d] - 2 * g_alpha_n * alpha_w;
    du[d] = du_hat + dp * w[d];
  }
  if (threadIdx.x == 0) chain.db[k] = own[width - 2];
}

}  // namespace

template <class T>
void shared_param_grads(const Chain<T>& chain, const SharedWorkspace<T>& workspace,
                        Stream& stream) {
  const int64_t columns = int64_t(chain.features) + chain.steps;
  const int column_threads = sum_columns(columns);
  const int pieces = int(batch_pieces(chain));
  const dim3 grid(unsigned(divide_up<int64_t>(columns, column_threads)),
                  unsigned(divide_up(chain.steps, kSumSteps)), unsigned(pieces));
  stream.launch(sums_kernel<T>, grid, kSumThreads, sum_shared_bytes<T>(), chain, workspace,
                column_threads);
  const int64_t elements = chain.steps * sums_per_step(chain);
  stream.launch(reduce_kernel<T>, unsigned(divide_up<int64_t>(elements, kReduceWidth)),
                kReduceThreads, kReduceThreads * sizeof(T), workspace.partial_sums, workspace.sums,
                elements, pieces);
  stream.launch(finish_kernel<T>, unsigned(chain.steps), kFinishThreads,
                group_sum_bytes<T>(kFinishThreads), chain, workspace);
}

template void shared_param_grads(const Chain<float>&, const SharedWorkspace<float>&, Stream&);
template void shared_param_grads(const Chain<double>&, const SharedWorkspace<double>&, Stream&);

}  // namespace fastflow
