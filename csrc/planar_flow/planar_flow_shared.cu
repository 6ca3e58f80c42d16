// planar_flow with parameters shared by all rows: w, u (K, D), b (K).
//
// The pre-activations of a row depend on each other through the products w_i . u_hat_j alone, so a
// panel of steps is two thin matrix products with a recurrence of scalars between them:
//
//   forward:   r = x w^T + b,     r_i += sum_{j<i} (w_i . u_hat_j) t_j,     x += t u_hat
//   backward:  h = g u_hat^T,     h_i += sum_{j>i} (w_j . u_hat_i) gamma_j,   g += gamma w
//
// with t = sigma tanh(a). Rows go through device memory once for up to 32 steps, whatever K is.
#include "planar_flow_shared.cuh"
#include "planar_flow_tile.cuh"

namespace fastflow {
namespace {

constexpr int kPrepareThreads = 256;
constexpr int kBlocks = 4;              // on a multiprocessor at least: 128 registers a thread
constexpr int64_t kLargeBatch = 16384;  // from here on tiles of 64 rows fill any GPU

// Rows of a thread in a large batch; double is not worth the time to compile a second size.
template <class T>
constexpr int kLargeRows = sizeof(T) == 4 ? 4 : 1;

// Block i: u_hat and the constants of the i-th visited step, and its products with those before it
// in its panel, whose constants it works out anew. A warp takes a step.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const Chain<T> chain, const SharedWorkspace<T> workspace, int panel) {
  const int lane = threadIdx.x % 32;
  const int features = chain.features;
  const int i = blockIdx.x, start = i / panel * panel;
  const T* const w_i = chain.w + int64_t(chain.step_at(i)) * features;
  for (int j = start + threadIdx.x / 32; j <= i; j += kPrepareThreads / 32) {
    const int64_t k = chain.step_at(j);
    const T* const w = chain.w + k * features;
    const T* const u = chain.u + k * features;
    T sums[2] = {0, 0};
    for (int d = lane; d < features; d += 32) {
      sums[0] += w[d] * u[d];
      sums[1] += w[d] * w[d];
    }
    group_sum<32>(sums, static_cast<T*>(nullptr), 0);
    const PlanarStep<T> step = planar_step(sums[0], sums[1], chain.centred);
    T product[1] = {0};
    for (int d = lane; d < features; d += 32) {
      const T u_hat = u[d] + step.alpha * w[d];
      if (j == i) workspace.u_hat[k * features + d] = u_hat;
      product[0] += w_i[d] * u_hat;
    }
    group_sum<32>(product, static_cast<T*>(nullptr), 0);
    if (lane == 0) {
      workspace.products[int64_t(i) * panel + (j - start)] = product[0];
      if (j == i) workspace.step[k] = step;
    }
  }
}

// The recurrence of one row over a panel from `first`: `value` holds r and becomes t, `a` gets
// the pre-activations. Returns the panel's part of the sum of L.
template <class T>
__device__ __forceinline__ T visit_forward(const Chain<T>& chain,
                                           const SharedWorkspace<T>& workspace, int panel,
                                           int first, int count, T* value, T* a) {
  T ladj = 0;
  for (int i = 0; i < count; ++i) {
    const int k = chain.step_at(first + i);
    const T* const product = workspace.products + int64_t(first + i) * panel;
    T r = value[i] + chain.b[k];
    for (int j = 0; j < i; ++j) r += product[j] * value[j];
    const PlanarStep<T> step = workspace.step[k];
    const T a_i = pre_activation(r, step, chain.inverse);
    const PlanarTanh<T> tanh_a = planar_tanh(a_i);
    a[i] = a_i;
    value[i] = chain.sigma() * copysign(tanh_a.t, a_i);
    ladj += planar_ladj(tanh_a, step);
  }
  return ladj;
}

// The same backward: `value` holds h and becomes gamma, `scalar` holds a and becomes dp.
template <class T>
__device__ __forceinline__ void visit_backward(const Chain<T>& chain,
                                               const SharedWorkspace<T>& workspace, int panel,
                                               int first, int count, T g_ladj, T* value,
                                               T* scalar) {
  for (int i = count - 1; i >= 0; --i) {
    T h = value[i];
    for (int j = i + 1; j < count; ++j)
      h += workspace.products[int64_t(first + j) * panel + i] * value[j];
    const PlanarStep<T> step = workspace.step[chain.step_at(first + i)];
    const PlanarPullback<T> pull = pull_back(scalar[i], h, g_ladj, step, chain.inverse);
    value[i] = pull.gamma;
    scalar[i] = pull.dp;
  }
}

template <class T, int kRows, int kPanel>
__global__ void __launch_bounds__(kTileThreads, kBlocks)
    forward_kernel(const Chain<T> chain, const SharedWorkspace<T> workspace) {
  Tile<T, kRows, kPanel> tile(chain, int64_t(blockIdx.x) * (kRows * kRowGroups));
  const bool has_row = int(threadIdx.x) < tile.rows;
  const int place = threadIdx.x * tile.kValueStride;
  const T* source = chain.in;
  T ladj = 0;
  for (tile.first = 0; tile.first < chain.steps; tile.first += kPanel) {
    tile.count = smaller(kPanel, chain.steps - tile.first);
    tile.products(source, chain.w);
    __syncthreads();
    T* const a = tile.x;  // what was there has been used
    if (has_row)
      ladj += visit_forward(chain, workspace, kPanel, tile.first, tile.count, tile.values + place,
                            a + place);
    __syncthreads();
    tile.each_scalar([&](int at, int64_t k) { chain.a[k] = a[at]; });
    tile.combine(source, chain.out, workspace.u_hat);
    source = chain.out;
  }
  if (has_row) chain.ladj[tile.first_row + threadIdx.x] = chain.sigma() * ladj;
}

template <class T, int kRows, int kPanel>
__global__ void __launch_bounds__(kTileThreads, kBlocks)
    backward_kernel(const Chain<T> chain, const SharedWorkspace<T> workspace) {
  Tile<T, kRows, kPanel> tile(chain, int64_t(blockIdx.x) * (kRows * kRowGroups));
  const bool has_row = int(threadIdx.x) < tile.rows;
  const int place = threadIdx.x * tile.kValueStride;
  const T g_ladj = has_row ? chain.sigma() * chain.dladj[tile.first_row + threadIdx.x] : T(0);
  const T* source = chain.d_out;
  for (tile.first = (chain.steps - 1) / kPanel * kPanel; tile.first >= 0; tile.first -= kPanel) {
    tile.count = smaller(kPanel, chain.steps - tile.first);
    tile.products(source, workspace.u_hat);
    __syncthreads();
    T* const scalars = tile.x;  // a, then dp
    tile.each_scalar([&](int at, int64_t k) { scalars[at] = chain.a[k]; });
    __syncthreads();
    if (has_row)
      visit_backward(chain, workspace, kPanel, tile.first, tile.count, g_ladj, tile.values + place,
                     scalars + place);
    __syncthreads();
    if (chain.param_grads)
      tile.each_scalar([&](int at, int64_t k) {
        workspace.gamma[k] = tile.values[at];
        workspace.dp[k] = scalars[at];
      });
    tile.combine(source, chain.d_in, chain.w);
    source = chain.d_in;
  }
}

template <class T, int kRows, int kPanel>
void launch_tiles(bool backward, const Chain<T>& chain, const SharedWorkspace<T>& workspace,
                  Stream& stream) {
  using BlockTile = Tile<T, kRows, kPanel>;
  stream.launch(backward ? backward_kernel<T, kRows, kPanel> : forward_kernel<T, kRows, kPanel>,
                unsigned(divide_up<int64_t>(chain.batch, BlockTile::kTileRows)), kTileThreads,
                BlockTile::kSharedBytes, chain, workspace);
}

template <class T>
void run_chain(bool backward, const Chain<T>& chain, const SharedWorkspace<T>& workspace,
               Stream& stream) {
  const int panel = panel_steps(chain.steps);
  stream.launch(prepare_kernel<T>, unsigned(chain.steps), kPrepareThreads, 0, chain, workspace,
                panel);
  const bool large = chain.batch >= kLargeBatch;
  constexpr int rows = kLargeRows<T>;
  const auto launch = panel == 8    ? (large ? launch_tiles<T, rows, 8> : launch_tiles<T, 1, 8>)
                      : panel == 16 ? (large ? launch_tiles<T, rows, 16> : launch_tiles<T, 1, 16>)
                                    : (large ? launch_tiles<T, rows, 32> : launch_tiles<T, 1, 32>);
  launch(backward, chain, workspace, stream);
}

}  // namespace

template <class T>
size_t shared_workspace_bytes(const Chain<T>& chain, bool backward) {
  return SharedWorkspace<T>(chain, backward, nullptr).bytes;
}

template <class T>
void shared(bool backward, const Chain<T>& chain, void* workspace, Stream& stream) {
  const SharedWorkspace<T> carved(chain, backward, workspace);
  run_chain(backward, chain, carved, stream);
  if (backward && chain.param_grads) shared_param_grads(chain, carved, stream);
}

template size_t shared_workspace_bytes(const Chain<float>&, bool);
template size_t shared_workspace_bytes(const Chain<double>&, bool);
template void shared(bool, const Chain<float>&, void*, Stream&);
template void shared(bool, const Chain<double>&, void*, Stream&);

}  // namespace fastflow
