// Sparse teachers on the CPU: checks, outputs, threads, and what is wrong with an entry.
#include <algorithm>
#include <cmath>

#include "alias/kernel.h"
#include "divergence/row_losses.h"
#include "sparse/draws.h"
#include "sparse/operator.h"

namespace fastkd::sparse {
namespace {

constexpr int64_t kGrainElements = 16384;  // work worth a thread

double value_at(const Tensor& t, int64_t i) {
  const void* const data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Double: return static_cast<const double*>(data)[i];
    case ScalarType::Float: return static_cast<const float*>(data)[i];
    case ScalarType::BFloat16: return static_cast<const torch::headeronly::BFloat16*>(data)[i];
    default: return static_cast<const torch::headeronly::Half*>(data)[i];
  }
}

[[noreturn]] void fail_at(int64_t row, const Fault& fault, int64_t classes, const Tensor& indices, const Tensor& log_probs,
                          const std::optional<Tensor>& tail_log_prob) {
  const int64_t at = row * indices.stride(0) + fault.entry;
  const int64_t c = indices.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(indices.const_data_ptr())[at]
                                                             : static_cast<const int64_t*>(indices.const_data_ptr())[at];
  switch (fault.what) {
    case Fault::kRange:
      fail("teacher_indices[", row, ", ", fault.entry, "] is ", c, ", must be in [0, ", classes,
           "), or its log-probability -inf");
    case Fault::kRepeated:
      fail("teacher_indices[", row, ", ", fault.entry, "] is ", c, ", which the row has before, must be classes that differ");
    case Fault::kLogProb:
      fail("teacher_log_probs[", row, ", ", fault.entry, "] is ", value_at(log_probs, row * log_probs.stride(0) + fault.entry),
           ", must be at most 0");
    case Fault::kTailLogProb:
      fail("teacher_tail_log_prob[", row, "] is ", value_at(*tail_log_prob, row * tail_log_prob->stride(0)),
           ", must be at most 0");
    default:
      fail("teacher_log_probs[", row, "] has probabilities that add up to ", fault.value,
           tail_log_prob.has_value() ? " with teacher_tail_log_prob, must be 1" : ", must be at most 1");
  }
}

std::tuple<Tensor, Tensor, Tensor> sparse_divergence(Tensor student, Tensor indices, Tensor log_probs,
                                                     std::optional<Tensor> tail_log_prob, std::optional<Tensor> target,
                                                     std::optional<Tensor> weight, std::optional<Tensor> temperatures,
                                                     double temperature, int64_t kind, int64_t tail, double beta, double kd_scale,
                                                     double task_scale, int64_t ignore_index, int64_t reduction,
                                                     bool student_gradient, std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature, beta, kd_scale, task_scale);
  check_arguments(student, indices, log_probs, tail_log_prob, target, weight, temperatures, temperature, kind, tail, beta,
                  reduction);
  const int64_t rows = student.size(0), classes = student.size(1);
  const dense::CheckedRows checked(rows, classes, target, weight, temperatures, ignore_index);
  const double denominator = checked.denominator(static_cast<Reduction>(reduction), classes);

  Tensor gradient = student_gradient ? empty_cpu({rows, classes}, student.scalar_type()) : empty_cpu({0}, student.scalar_type());
  dense::RowLosses losses(rows);
  std::vector<Fault> faults(rows);
  RowParams params{{dense::row_inputs(student, student, target, temperature, kind, beta, task_scale, ignore_index)}};
  params.dtype = kernel_dtype(student);
  checked.give(params);
  losses.give(params, kd_scale, task_scale, denominator);
  params.student_gradient = student_gradient ? gradient.mutable_data_ptr() : nullptr;
  params.stream = static_cast<size_t>(gradient.numel()) * gradient.element_size() >= dense::kStreamBytes;
  params.given = teacher_of(tail, indices, log_probs, tail_log_prob);
  params.faults = faults.data();
  const Kernels& k = kernels();
  const int64_t bytes = scratch_bytes(classes, params.given.entries);
  parallel(rows, std::max<int64_t>(1, kGrainElements / classes),
           [&](int64_t begin, int64_t end) { k.rows(params, begin, end, scratch<char>(bytes)); });
  for (int64_t r = 0; r < rows; ++r) {
    if (faults[r].what != Fault::kNone) fail_at(r, faults[r], classes, indices, log_probs, tail_log_prob);
  }
  auto [loss, terms] =
      losses.reduced(static_cast<Reduction>(reduction), dense::loss_dtype(student), kd_scale, task_scale, denominator);
  return {loss, terms, gradient};
}

// One row: its weights in order, walked through by the sorted draws. False where it is no distribution.
bool draw_row(const alias::Scores& scores, int64_t classes, uint64_t seed, int64_t row, int64_t draws, uint64_t* weights,
              uint64_t* places, int64_t* indices, float* log_probs) {
  const alias::Extent extent = alias::kernels().extent(scores.dtype, scores.data, 0, classes);
  if (extent.invalid || extent.maximum == -std::numeric_limits<double>::infinity()) return false;
  alias::Scores relative = scores;
  relative.reference = extent.maximum;
  const uint64_t total = alias::kernels().quantise(relative, 0, classes, weights);
  for (int64_t i = 0; i < draws; ++i) places[i] = sparse_draws::place_of(seed, row, draws, i, total);
  std::sort(places, places + draws);
  int64_t made = 0, c = 0;
  uint64_t end = weights[0];
  for (int64_t i = 0; i < draws; ++made) {
    while (places[i] >= end) end += weights[++c];
    const int64_t first = i;
    while (i < draws && places[i] < end) ++i;
    indices[made] = c;
    log_probs[made] = static_cast<float>(std::log(sparse_draws::share(i - first, draws)));
  }
  std::fill(indices + made, indices + draws, 0);
  std::fill(log_probs + made, log_probs + draws, -std::numeric_limits<float>::infinity());
  return true;
}

std::tuple<Tensor, Tensor> sample_teacher(Tensor teacher, Tensor seed, int64_t draws, double temperature,
                                          std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature);
  check_draws(teacher, seed, draws, temperature);
  const int64_t rows = teacher.size(0), classes = teacher.size(1);
  Tensor indices = empty_cpu({rows, draws}, ScalarType::Long), log_probs = empty_cpu({rows, draws}, ScalarType::Float);
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const char* const data = static_cast<const char*>(teacher.const_data_ptr());
  const int64_t row_bytes = rows > 0 ? teacher.stride(0) * static_cast<int64_t>(teacher.element_size()) : 0;
  std::vector<char> good(rows);
  parallel(rows, std::max<int64_t>(1, kGrainElements / classes), [&](int64_t begin, int64_t end) {
    uint64_t* const weights = scratch<uint64_t>(static_cast<size_t>(classes + draws));
    for (int64_t r = begin; r < end; ++r) {
      const alias::Scores scores{kernel_dtype(teacher),
                                 data + r * row_bytes,
                                 0,
                                 sparse_draws::kappa_of(temperature),
                                 sparse_draws::exponent_of(classes),
                                 0};
      good[r] = draw_row(scores, classes, key, r, draws, weights, weights + classes,
                         static_cast<int64_t*>(indices.mutable_data_ptr()) + r * draws,
                         static_cast<float*>(log_probs.mutable_data_ptr()) + r * draws);
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    FASTKD_CHECK(good[r], "teacher_logits[", r, "] holds NaN, +inf or nothing but -inf, must have a softmax");
  }
  return {indices, log_probs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("sparse_divergence", FASTKD_CPU_BOX(sparse_divergence));
  m.impl("sample_teacher", FASTKD_CPU_BOX(sample_teacher));
}

}  // namespace fastkd::sparse
