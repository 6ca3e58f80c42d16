// The order in which an autoregressive network becomes known, feature after feature: what the sweep
// of the inverse and the reverse sweep of its backward share.
#pragma once

#include "autoregressive_network.h"

namespace fastflow {

// The units of a level that the first r features determine are, in sorted order, its first ones.
// A sweep at feature r computes the outputs 2r and 2r + 1, then the feature, then level by level
// the units between known(level, r) and known(level, r + 1).
//
// Features are taken in blocks, as in a blocked triangular solve: what the units of a block read of
// everything before it is one product for all of them, and only what they read of the block itself
// is left to its features, one by one. The reverse sweep takes its blocks from larger ones in the
// same way: it reads a piece of each row of the weights, and only a large block's piece is worth
// going to that row for. How the terms of a sum are grouped depends on the network alone.
template <class T>
class Schedule {
 public:
  int64_t features;  // D
  int64_t block;     // features in a block
  int64_t large;     // features in a large block, a multiple of `block`

  explicit Schedule(const Network<T>& net)
      : features(net.layers[0].columns), memory_(bytes(net, features)) {
    const int64_t hidden = net.layer_count - 1;
    known_ = memory_.template take<int32_t>((hidden + 2) * (features + 1));
    offset_ = memory_.template take<int64_t>(net.layer_count);
    for (int64_t r = 0; r <= features; ++r) row(0)[r] = int32_t(r);
    for (int64_t r = 0; r <= features; ++r) row(hidden + 1)[r] = int32_t(2 * r);

    const int32_t* below = nullptr;    // how many features the units of level l need
    const int32_t* skipped = nullptr;  // and of level l - 1
    int64_t widest = features, offset = 0;
    for (int64_t l = 0; l < hidden; ++l) {
      const SortedLayer<T>& layer = net.layers[l];
      int32_t* needs = memory_.template take<int32_t>(layer.rows);
      for (int64_t k = 0, need = 0, r = 0; k <= layer.rows; ++k) {
        if (k < layer.rows) {
          const int32_t prefix = layer.prefix[k];
          const int32_t seen = l == 0 ? prefix : prefix > 0 ? below[prefix - 1] : 0;
          need = std::max<int64_t>(need, seen);
          if (layer.skip) need = std::max<int64_t>(need, skipped[k]);
          needs[k] = int32_t(need);
        } else {
          need = features + 1;
        }
        for (; r < need; ++r) row(l + 1)[r] = int32_t(k);
      }
      skipped = below;
      below = needs;
      widest = std::max(widest, layer.rows);
      offset_[l] = offset;
      offset += layer.rows;
    }
    offset_[hidden] = offset;
    // About two dozen units of a level in a block: enough to share what is loaded for the product,
    // few enough that nearly all of the arithmetic is in the product.
    block = std::clamp<int64_t>(kBlockUnits * features / widest, 1, kMaxBlock);
    large = std::max<int64_t>(kLargeUnits * features / widest / block, 1) * block;
  }

  int64_t known(int64_t level, int64_t r) const { return known_[level * (features + 1) + r]; }
  // Where level l + 1 begins among the units of levels 1 .. L + 1, the order in `saved`.
  int64_t offset(int64_t l) const { return offset_[l]; }

 private:
  static constexpr int64_t kBlockUnits = 24, kMaxBlock = 32, kLargeUnits = 128;
  using Memory = Scratch<Schedule>;
  Memory memory_;
  int32_t* known_;  // (L + 2, D + 1)
  int64_t* offset_;

  int32_t* row(int64_t level) { return known_ + level * (features + 1); }

  static size_t bytes(const Network<T>& net, int64_t features) {
    size_t sum = Memory::template bytes<int32_t>((net.layer_count + 1) * (features + 1)) +
                 Memory::template bytes<int64_t>(net.layer_count);
    for (int64_t l = 0; l + 1 < net.layer_count; ++l)
      sum += Memory::template bytes<int32_t>(net.layers[l].rows);
    return sum;
  }
};

}  // namespace fastflow
