// The gradient map and its log-determinant, a tile of rows at a time.
#include "pcp_tile.h"

namespace fastflow {
namespace {

template <class T>
void forward(const PcpArgs& args) {
  const int64_t tiles = tile_count<T>(args);
  parallel_tasks(tiles, tiles * tile_cycles(args) > kThreadCycles, [&](int64_t task) {
    with_workspace<PcpTile<T>>(args, [&](PcpTile<T>& tile) {
      tile.load_terms(task);
      tile.load_rows(args.in, tile.x);
      tile.activate(tile.x, false);
      tile.gradient(tile.x);
      tile.hessian();
      tile.store_rows(tile.y, args.out, args.features);
      tile.store_numbers(factorise(tile.D, tile.matrix, tile.reciprocals), args.ladj);
    });
  });
}

}  // namespace

void pcp_forward_cpu(const PcpArgs& args) {
  args.is_double ? forward<double>(args) : forward<float>(args);
}

}  // namespace fastflow
