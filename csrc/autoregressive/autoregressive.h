// Argument struct and launchers of the ops made and autoregressive. Plain pointers and sizes: no
// torch header, so that the binding and the kernels can both include it.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace fastflow {

enum class Activation : int64_t { relu, tanh, elu, silu, gelu, softplus, leaky_relu };
enum class Scale : int64_t { softclip, softplus, sigmoid, clamp, gate };

// Layer l = 0 .. L maps level l (level 0 is x) to level l + 1. Units are numbered here as in the
// tensors; order[k] is the unit at sorted position k, and in sorted order unit k of level l + 1
// sees the first prefix[k] units of level l. Null pointers: what is missing or not wanted.
struct MaskedLayer {
  int64_t rows;                 // n_{l+1}
  int64_t columns;              // n_l
  const int32_t* order;         // (rows)
  const int32_t* prefix;        // (rows), nondecreasing
  const int32_t* column_order;  // (columns), the order of level l

  const void* weight;  // (rows, columns)
  const void* bias;    // (rows)
  const void* term;    // (B, rows)

  // Backward only.
  void* dweight;  // (rows, columns)
  void* dbias;    // (rows)
  void* dterm;    // (B, rows)
};

// What a context c (B, C) adds to the pre-activations of the first level: V c + v, or act(V c + v).
// `layer` has the weight V (n_1, C), the bias v and their gradients; every unit sees all columns.
struct ContextLayer {
  MaskedLayer layer;
  bool activated;
  const void* values;  // (B, C)
  void* d_values;      // (B, C), backward only
};

// Rows of a tile on a CPU: fewer where that is what lets threads share the work; half a dozen tiles
// do, and every tile goes through all weights. Only the batch decides, so that every op finds the
// same layout of `saved`.
constexpr int64_t kMostTileRows = 64;
inline int64_t tile_rows(int64_t batch) {
  int64_t rows = kMostTileRows;
  while (rows > 16 && (batch + rows - 1) / rows < 6) rows /= 2;
  return rows;
}

// Every pointer is to contiguous memory of one dtype (float or double). `x` is always the network's
// input and `y` the other side: made's output, or the result of the scale map.
struct AutoregressiveArgs {
  int64_t batch;        // B
  int64_t features;     // D
  int64_t layer_count;  // L + 1
  const MaskedLayer* layers;
  const ContextLayer* context;  // null: none. On CPUs only
  Activation activation;
  bool residual;
  bool affine;  // false: made, which has no scale map, ladj or inverse
  Scale scale;
  double c0;
  double c1;
  bool is_double;

  // Forward: x and what it writes. Inverse: y and what it writes.
  void* x;      // (B, D)
  void* y;      // (B, n_{L+1}), affine: (B, D)
  void* ladj;   // (B), affine only
  void* saved;  // see autoregressive_tile.h; null if not wanted

  // Backward only: the cotangent of the op's output, and of its input (null if not wanted).
  const void* d_out;   // made: (B, n_{L+1}), affine: (B, D)
  const void* d_ladj;  // (B), affine only
  void* d_in;          // (B, D)

  // CUDA only; the stairs are in device memory then.
  void* workspace;       // device memory of the size that the query below returns
  int64_t shared_limit;  // bytes of shared memory that a block may ask for
  int64_t processors;    // multiprocessors of the GPU

  int64_t outputs() const { return layers[layer_count - 1].rows; }
  // Units between context and first level that have pre-activations of their own.
  int64_t context_units() const { return context && context->activated ? layers[0].rows : 0; }
};

// B, D, n_l >= 1; the stairs as the struct says.
void autoregressive_forward_cpu(const AutoregressiveArgs& args);
void autoregressive_backward_cpu(const AutoregressiveArgs& args);
void autoregressive_inverse_cpu(const AutoregressiveArgs& args);
void autoregressive_inverse_backward_cpu(const AutoregressiveArgs& args);

enum class MaskedPass { forward, backward, inverse, inverse_backward };

// Enqueues a pass on the stream; returns nullptr, or what is wrong.
const char* autoregressive_cuda(MaskedPass pass, const AutoregressiveArgs& args,
                                CUstream_st* stream);
// Bytes of workspace that the call above needs; the contents need no initialisation.
size_t autoregressive_cuda_workspace(MaskedPass pass, const AutoregressiveArgs& args);
// Elements of `saved` that are used; the binding allocates whole tiles.
int64_t autoregressive_cuda_saved(const AutoregressiveArgs& args);
// Sets shared_limit and processors to those of the current device.
const char* autoregressive_cuda_device(AutoregressiveArgs& args);

}  // namespace fastflow
