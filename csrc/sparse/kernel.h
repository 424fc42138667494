// The row kernel of sparse teachers as the launcher sees it: plain data in, plain functions.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "divergence/kernel.h"

namespace fastkd::sparse {

using ::fastkd::divergence::Kind;

// What becomes of the classes that the teacher has no entry for. Values as in fastkd/ops/sparse.py.
enum class Tail : int64_t {
  kBucket = 0,       // they are one outcome more
  kRenormalize = 1,  // both sides are softmaxes over the entries alone
  kDrop = 2,         // both sides are of all classes, and the sum is over the entries
};

// A number of each row, of any float dtype.
struct Floats {
  const void* data;
  Dtype dtype;
  int64_t stride;  // elements from row to row
};

// k entries of each row: a class and the logarithm of its probability. One of -inf is padding: its class is not looked at.
struct Teacher {
  Tail tail;
  int64_t entries;
  const void* indices;  // last dimension contiguous
  bool narrow;          // indices are int32, else int64
  int64_t index_stride;
  Floats log_probs;      // [rows, entries], last dimension contiguous
  Floats tail_log_prob;  // [rows]; null: what the entries leave
};

// What is wrong with a row, and where.
struct Fault {
  enum What : int64_t { kNone, kRange, kRepeated, kLogProb, kTailLogProb, kSum } what = kNone;
  int64_t entry = 0;
  double value = 0;  // of kSum
};

struct RowParams : ::fastkd::divergence::RowParams {
  Teacher given{};
  Fault* faults = nullptr;  // [rows]; a row that has one is left as it is
};

struct Kernels {
  void (*rows)(const RowParams&, int64_t begin, int64_t end, void* scratch);
};

constexpr int64_t kScratchArrays = 5;  // of so many numbers

constexpr int64_t scratch_words(int64_t classes) { return (classes + 63) / 64; }
constexpr int64_t padded(int64_t numbers) { return (numbers + 7) / 8 * 8; }  // a register may be 8 of them

// Bytes of scratch that `rows` needs for one thread.
constexpr int64_t scratch_bytes(int64_t classes, int64_t entries) {
  return 8 * (padded(scratch_words(classes)) + kScratchArrays * padded(entries + 1));
}

}  // namespace fastkd::sparse

FASTKD_DECLARE_KERNELS(sparse)
