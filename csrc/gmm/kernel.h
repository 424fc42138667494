// The kernels of gmm as the launcher sees them: plain data in, plain functions.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastkd::gmm {

// Outcome of a fit. Values as in fastkd/selection.py; the CPU launcher turns the last into an error.
enum Status : int64_t { kConverged = 0, kMaxIter = 1, kConstant = 2, kTooFew = 3, kNonFinite = 4, kInvalid = 5 };

// Values of one problem are cut into chunks of this many; sums go chunk by chunk, whoever computes them.
constexpr int64_t kChunk = 4096;

// The elements of the B problems: [B, columns], of which lengths[b] count, or flat with B + 1 offsets.
struct Layout {
  int64_t problems;
  int64_t columns;
  int64_t stride;          // elements from row to row of the values
  int64_t elements;        // of packed tensors
  const int64_t* offsets;  // or null
  const int64_t* lengths;  // or null

  int64_t size(int64_t b) const {
    return offsets != nullptr ? offsets[b + 1] - offsets[b] : lengths != nullptr ? lengths[b] : columns;
  }
  int64_t begin(int64_t b) const { return offsets != nullptr ? offsets[b] : b * stride; }          // in the values
  int64_t packed_begin(int64_t b) const { return offsets != nullptr ? offsets[b] : b * columns; }  // in packed tensors
};

struct FitParams {
  Dtype dtype;
  Layout layout;
  const void* values;
  Dtype weight_dtype;
  const void* sample_weight;   // packed, or null for 1
  const double* init_weights;  // [B, 2] each, or null
  const double* init_means;
  const double* init_deviations;
  bool normalize;
  int64_t max_iter;
  double tol;
  double reg_covar;
  double* weights;  // [B, 2] each
  double* means;
  double* deviations;
  int64_t* iterations;  // [B] each
  double* log_likelihood;
  int64_t* status;
};

struct PosteriorParams {
  Dtype dtype;
  Layout layout;
  const void* values;
  const double* weights;  // [B, 2] each
  const double* means;
  const double* deviations;
  bool monotone;
  double threshold;
  void* posterior;  // packed; double for double values, else float
  uint8_t* mask;    // packed
};

// Runs task(argument, 0 ... count - 1), in any order, on whatever threads it has.
struct Team {
  void (*run)(int64_t count, void (*task)(void* argument, int64_t index), void* argument);
};

struct Kernels {
  void (*fit)(const FitParams&, int64_t problem, const Team& team, double* scratch);
  // elements [first, last) of a problem, counted in the packed output
  void (*posterior)(const PosteriorParams&, int64_t problem, int64_t first, int64_t last);
};

constexpr int64_t kPartials = 8;  // doubles that a chunk hands back

constexpr int64_t chunks_of(int64_t n) { return n <= kChunk ? 1 : (n + kChunk - 1) / kChunk; }

// Doubles of scratch for a problem of n values: the values, the weights, and what the chunks hand back.
constexpr int64_t scratch_doubles(int64_t n, bool weighted) {
  const int64_t padded = (n + 15) / 16 * 16;
  return padded * (weighted ? 2 : 1) + chunks_of(n) * (kPartials + 1);
}

}  // namespace fastkd::gmm

FASTKD_DECLARE_KERNELS(gmm)
