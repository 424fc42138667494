// The row kernels of divergences whose classes lie on several ranks, as the launchers see them: plain data in, plain functions.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "divergence/kernel.h"

namespace fastkd::divergence_shard {

using ::fastkd::divergence::Kind;

// Sums of a row, of this rank or of all: in `sums` [kSums, rows]. y is the side that the divergence goes to, x the other.
enum Sum : int64_t { kTopY, kTopX, kZY, kZX, kD, kZTask, kSums };
// The divergence where sums are not enough, and whether they are not; for Jensen-Shannon KL(q || m) and KL(p || m).
constexpr int64_t kTerms = 2;

// What the ranks exchange, and what a rank alone has.
struct Exchanged {
  int64_t rows;
  double* sums;          // [kSums, rows]
  double* terms;         // [kTerms, rows]
  const int64_t* label;  // [rows]: the class of the cross-entropy among this rank's, or -1

  FASTKD_HOST_DEVICE double sum(Sum which, int64_t row) const { return sums[which * rows + row]; }
  FASTKD_HOST_DEVICE double& sum_at(Sum which, int64_t row) const { return sums[which * rows + row]; }
  FASTKD_HOST_DEVICE double term(int64_t which, int64_t row) const { return terms[which * rows + row]; }
};

struct RowParams : ::fastkd::divergence::RowParams {
  Exchanged exchanged{};
};

struct Kernels {
  void (*sums)(const RowParams&, int64_t begin, int64_t end);
  void (*terms)(const RowParams&, int64_t begin, int64_t end);
  void (*gradients)(const RowParams&, int64_t begin, int64_t end);
};

}  // namespace fastkd::divergence_shard

FASTKD_DECLARE_KERNELS(divergence_shard)
