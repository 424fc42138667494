// What the launchers of both sides share: checks of the arguments, outputs, parameters.
#pragma once

#include "common/numbers.h"
#include "common/tensor.h"
#include "relation/kernel.h"

namespace fastkd::relation {

inline Tensor checked_features(const char* name, const Tensor& t) {
  check_dtype(name, t, kFloats);
  check_dim(name, t, 2);
  FASTKD_CHECK(t.size(0) > 0 && t.size(1) > 0, name, " has shape ", shape_of(t),
               ", must have at least one point and one feature");
  return t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline void check_weight(const char* name, double weight) {
  FASTKD_CHECK(weight >= 0 && weight <= std::numeric_limits<double>::max(), name, " is ", weight,
               ", must be finite and not negative");
}

inline Features features_of(const Tensor& t) { return {kernel_dtype(t), t.const_data_ptr(), t.size(0), t.size(1), t.stride(0)}; }

// The arguments of the operator, checked, and its outputs.
struct Relation {
  Tensor features[2];
  Tensor loss, terms, pairs[2];
  Params params{};
  double weight[2];  // distance, angle

  template <typename Fresh>
  Relation(const Tensor& student, const Tensor& teacher, double distance_weight, double angle_weight, const bool (&gradients)[2],
           const Fresh& empty)
      : features{checked_features("student_features", student), checked_features("teacher_features", teacher)},
        weight{distance_weight, angle_weight} {
    const int64_t points = student.size(0);
    FASTKD_CHECK(teacher.size(0) == points, "teacher_features has shape ", shape_of(teacher), ", must be (", points,
                 ", ...) as student_features is ", shape_of(student));
    check_device("teacher_features", teacher, "student_features", student);
    check_weight("distance_weight", distance_weight);
    check_weight("angle_weight", angle_weight);
    if (distance_weight == 0 && angle_weight == 0) features[1] = features[0];  // the teacher is not looked at
    const bool wide = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
    const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
    loss = empty({}, type);
    terms = empty({2}, type);
    const double n = static_cast<double>(points);
    params.points = points;
    params.distance = distance_weight > 0;
    params.angle = angle_weight > 0;
    params.distance_scale = 2 * distance_weight / (n * n);
    params.angle_scale = 2 * angle_weight / (n * n * n);
    for (int side = 0; side < 2; ++side) {
      pairs[side] = gradients[side] ? empty({points, points}, ScalarType::Double) : empty({0}, ScalarType::Double);
      params.pairs[side] = gradients[side] ? static_cast<double*>(pairs[side].mutable_data_ptr()) : nullptr;
    }
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> outputs() const { return {loss, terms, pairs[0], pairs[1]}; }
};

// The same for the gradient of the features.
inline Tensor check_backward(const Tensor& features, Tensor& pairs, const Tensor& grad_loss) {
  const Tensor packed = checked_features("features", features);
  check_dtype("pairs", pairs, {ScalarType::Double});
  check_shape("pairs", pairs, {features.size(0), features.size(0)});
  check_device("pairs", pairs, "features", features);
  pairs = torch::stable::contiguous(pairs);
  check_dtype("grad_loss", grad_loss, {ScalarType::Float, ScalarType::Double});
  check_shape("grad_loss", grad_loss, {});
  check_device("grad_loss", grad_loss, "features", features);
  return packed;
}

}  // namespace fastkd::relation
