// What the CUDA kernels of planar_flow share: typed arguments and the scalar part of a step.
#pragma once

#include "../common/device.cuh"
#include "planar_flow.h"
#include "planar_flow_math.h"

namespace fastflow {

// PlanarFlowArgs with its type. Steps are visited in the order i = 0 .. K-1 and sigma = +1
// (forward) or -1 (inverse) is the sign of what a step adds:  x_{i+1} = x_i + sigma u_hat_i t_i.
template <class T>
struct Chain {
  int64_t batch;
  int features;
  int steps;
  bool centred;
  bool inverse;
  bool param_grads;
  bool aligned;  // every row of D elements starts on 16 bytes and is made of whole quads

  const T* in;  // (B, D)
  const T* w;
  const T* u;
  const T* b;
  T* out;   // (B, D)
  T* ladj;  // (B)
  T* a;     // (B, K)

  const T* d_out;  // (B, D)
  const T* dladj;  // (B)
  T* d_in;         // (B, D)
  T* dw;
  T* du;
  T* db;

  explicit Chain(const PlanarFlowArgs& args);

  __host__ __device__ int step_at(int i) const { return inverse ? steps - 1 - i : i; }
  __host__ __device__ T sigma() const { return inverse ? T(-1) : T(1); }
};

template <class T>
Chain<T>::Chain(const PlanarFlowArgs& args)
    : batch(args.batch),
      features(int(args.features)),
      steps(int(args.steps)),
      centred(args.centred),
      inverse(args.inverse),
      param_grads(args.param_grads),
      aligned(args.features % 4 == 0),
      in(static_cast<const T*>(args.in)),
      w(static_cast<const T*>(args.w)),
      u(static_cast<const T*>(args.u)),
      b(static_cast<const T*>(args.b)),
      out(static_cast<T*>(args.out)),
      ladj(static_cast<T*>(args.ladj)),
      a(static_cast<T*>(args.a)),
      d_out(static_cast<const T*>(args.d_out)),
      dladj(static_cast<const T*>(args.dladj)),
      d_in(static_cast<T*>(args.d_in)),
      dw(static_cast<T*>(args.dw)),
      du(static_cast<T*>(args.du)),
      db(static_cast<T*>(args.db)) {
  for (const void* p : {args.in, args.w, args.u, static_cast<const void*>(args.out), args.d_out,
                        static_cast<const void*>(args.d_in), static_cast<const void*>(args.dw),
                        static_cast<const void*>(args.du)})
    aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// tanh(a) of PlanarTanh, which holds tanh|a|.
template <class T>
__device__ __forceinline__ T signed_tanh(T a) {
  return copysign(planar_tanh(a).t, a);
}

// The pre-activation of a step from r = w.x + b: r itself, or the root of a + s1 tanh(a) = r.
template <class T>
__device__ __forceinline__ T pre_activation(T r, const PlanarStep<T>& step, bool inverse) {
  return inverse ? planar_solve(r, step) : r;
}

// One launcher per kind of parameters and type, for both directions of differentiation.
template <class T>
void amortised(bool backward, const Chain<T>& chain, Stream& stream);
template <class T>
void shared(bool backward, const Chain<T>& chain, void* workspace, Stream& stream);

// Bytes of their workspace; the amortised ones need none.
template <class T>
size_t shared_workspace_bytes(const Chain<T>& chain, bool backward);

}  // namespace fastflow
