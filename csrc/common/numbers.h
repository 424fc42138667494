// Numbers of a call that come in a tensor. Where a compiled program computes them anew each time, the schema's floats would
// be constants of the program; fastkd/ops/_numbers.py puts them into a tensor there.
#pragma once

#include "common/tensor.h"

namespace fastkd {

namespace numbers_detail {
inline int64_t count(double) { return 1; }
inline int64_t count(const std::vector<double>& values) { return static_cast<int64_t>(values.size()); }
inline void take(const double*& next, double& value) { value = *next++; }
inline void take(const double*& next, std::vector<double>& values) {
  for (double& value : values) take(next, value);
}
}  // namespace numbers_detail

// Replaces the values, doubles or lists of them in the order of the schema, where a tensor is given: on the CPU whatever the
// device of the others, so that it can be read without waiting.
template <typename... Values>
void take_numbers(const std::optional<Tensor>& numbers, Values&... values) {
  if (!numbers.has_value()) return;
  check_dtype("numbers", *numbers, {ScalarType::Double});
  check_shape("numbers", *numbers, {(numbers_detail::count(values) + ...)});
  FASTKD_CHECK(numbers->is_cpu() && numbers->is_contiguous(), "numbers must be contiguous, on the CPU");
  const double* next = static_cast<const double*>(numbers->const_data_ptr());
  (numbers_detail::take(next, values), ...);
}

}  // namespace fastkd
