// The integer maths of the alias table, CPU and CUDA: the same bits everywhere.
//
// Weights. Item i of score u_i has weight w_i = round(2^E * 2^t), t = (u_i - reference) * kappa, kappa = lambda log2 e:
// softmax(lambda u) in fixed point. E is as large as keeps the total below 2^52, so that the rounding of N items moves
// the distribution by at most N / 2^51 in total variation; 2^t itself is right to 6.4e-10. The only floating point is
// one subtraction and one product in fp64 (each rounded once, nothing to contract), then integers.
//
// Table. Blocks of 4096 items. In a block of n items and weight C = sum w, bin i holds exactly C units of the scaled
// weights a_i = n w_i: the first `threshold` of them belong to item i, the rest to item `alias`. Sum over bins of what
// an item owns is n w_i, exactly. A bin is one word: threshold (52 bits) and alias (12 bits). A top table of the same
// kind chooses the block. Filling order (Huebschle-Schneider & Sanders, arXiv:1903.00227, "sweep"): lights (a_i <= C) and
// heavies in index order, each light filled up by the current heavy, a heavy that falls to C or below closes its own bin
// with the next heavy. In prefix sums: light k goes to the first heavy j with surplus S_j > deficit D_{k-1}; so a GPU
// can compute the same table in parallel.
#pragma once

#include <cstdint>

#include "common/fixed_point.h"
#include "common/host_device.h"
#include "common/philox.h"

namespace fastkd::FASTKD_ISA::alias_math {

constexpr int kBlockBits = 12;
constexpr int64_t kBlockSize = int64_t{1} << kBlockBits;
constexpr uint64_t kAliasMask = kBlockSize - 1;
constexpr int kTotalBits = 52;  // the total weight stays below 2^52

constexpr double kLog2E = 1.44269504088896340736;

// 2^f = 1 + f (c0 + f (c1 + ...)) for f in [0, 1), coefficients and f in units of 2^-32: minimax, 4.4e-11
constexpr uint32_t kExp2[7] = {2977044488u, 1031764554u, 238392259u, 41293032u, 5763423u, 617496u, 92044u};
constexpr int kExponentBias = 64;                       // t >= -64 has a positive biased exponent
constexpr double kLargestT = 63.0;                      // of an update; a build has t <= 0
constexpr int kFractionBits = 45;                       // of t in fixed point
constexpr double kFractionScale = 35184372088832.0;     // 2^45
constexpr double kMagic = 6755399441055744.0;           // 1.5 * 2^52: adding it rounds to an integer in the low bits
constexpr uint64_t kMagicBits = 0x4338000000000000ull;  // its bit pattern

FASTKD_HOST_DEVICE int64_t block_count(int64_t items) { return (items + kBlockSize - 1) / kBlockSize; }
FASTKD_HOST_DEVICE int64_t block_items(int64_t items, int64_t block) {
  const int64_t left = items - block * kBlockSize;
  return left < kBlockSize ? left : kBlockSize;
}

FASTKD_HOST_DEVICE uint64_t pack(uint64_t threshold, uint64_t alias) { return threshold << kBlockBits | alias; }
FASTKD_HOST_DEVICE uint64_t threshold_of(uint64_t bin) { return bin >> kBlockBits; }
FASTKD_HOST_DEVICE uint64_t alias_of(uint64_t bin) { return bin & kAliasMask; }

// The random words of draw `index`: one for the top table, one for the block.
struct DrawWords {
  uint64_t top;
  uint64_t block;
};
FASTKD_HOST_DEVICE DrawWords draw_words(uint64_t seed, uint64_t index) {
  const Words words = philox(seed, Stream::kAlias, index);
  return {words.w[0] | static_cast<uint64_t>(words.w[1]) << 32, words.w[2] | static_cast<uint64_t>(words.w[3]) << 32};
}

}  // namespace fastkd::FASTKD_ISA::alias_math
