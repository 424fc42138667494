// The row kernel of divergence as the launcher sees it: plain data in, plain functions.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastkd::divergence {

// Which divergence of p = softmax(teacher / T) and q = softmax(student / T). Values as in fastkd/ops/divergence.py.
enum class Kind : int64_t {
  kForward = 0,           // KL(p || q) = sum p (log p - log q)
  kReverse = 1,           // KL(q || p)
  kJensenShannon = 2,     // beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
  kSoftCrossEntropy = 3,  // -sum p log q
};

// What the row kernels of both sides read of a call.
struct RowInputs {
  Kind kind;
  int64_t classes;
  const void* student;  // [rows, classes], last dimension contiguous
  const void* teacher;
  int64_t student_stride;  // elements from row to row
  int64_t teacher_stride;
  const int64_t* target;   // [rows], or null
  int64_t ignore_index;    // rows with this target yield zeros
  bool task;               // compute the cross-entropy with the target, at T = 1
  double temperature_all;  // where no row has its own
  double beta;
};

struct RowParams : RowInputs {
  Dtype dtype{};
  const double* weight = nullptr;       // [rows], or null for 1
  const double* temperature = nullptr;  // [rows], or null for temperature_all
  double kd_scale = 0;                  // of T^2 * divergence in the gradients, the reduction's denominator included
  double task_scale = 0;                // of the cross-entropy
  double* kd_loss = nullptr;            // [rows]: weight * T^2 * divergence
  double* task_loss = nullptr;          // [rows]: weight * cross-entropy
  void* student_gradient = nullptr;     // [rows, classes] packed, or null
  void* teacher_gradient = nullptr;
  bool stream = false;  // gradients exceed the caches: write around them
  bool ahead = false;   // rows leave room in L2 for the next one: fetch it during this one
};

// Per-row statistics of z = logits / T.
struct StatsParams {
  Dtype dtype;
  int64_t classes;
  const void* logits;
  int64_t stride;
  double temperature;
  void* max;  // [rows] each, float (double for double logits)
  int64_t* argmax;
  void* mean;
  void* logsumexp;
  void* entropy;
};

// Gradient of any combination of the statistics.
struct StatsBackwardParams {
  Dtype dtype;
  int64_t classes;
  const void* logits;
  int64_t stride;
  double temperature;
  const int64_t* argmax;
  const void* logsumexp;
  const void* entropy;
  const void* grad_max;  // [rows] each, or null
  const void* grad_mean;
  const void* grad_logsumexp;
  const void* grad_entropy;
  void* gradient;  // [rows, classes] packed
};

struct Kernels {
  void (*rows)(const RowParams&, int64_t begin, int64_t end, void* scratch);
  void (*stats)(const StatsParams&, int64_t begin, int64_t end);
  void (*stats_backward)(const StatsBackwardParams&, int64_t begin, int64_t end);
  // data[i] *= factor for packed elements
  void (*scale)(Dtype dtype, void* data, int64_t count, double factor);
};

// Bytes of scratch that `rows` needs for one thread.
constexpr int64_t scratch_bytes(int64_t classes, Dtype dtype) {
  const int64_t padded = (classes + 15) / 16 * 16;
  return 4 * padded * (dtype == Dtype::kFloat64 ? 8 : 4);
}

}  // namespace fastkd::divergence

FASTKD_DECLARE_KERNELS(divergence)
