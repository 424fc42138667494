// The operators of relation: relational distillation of a batch of features. Semantics: fastkd/ops/relation.py; maths: math.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // Features [B, d] and [B, e], of any two float dtypes; terms = (distance, angle), unscaled; a term of weight 0 is 0.
  // loss = distance_weight * distance + angle_weight * angle. pairs: float64 [B, B], the gradient of the loss with
  // respect to half the squared distance of each pair of points (symmetric; 0 on the diagonal); not asked for: empty.
  m.def(
      "relation(Tensor student_features, Tensor teacher_features, float distance_weight, float angle_weight, "
      "bool student_gradient, bool teacher_gradient, Tensor? numbers=None) "
      "-> (Tensor loss, Tensor terms, Tensor student_pairs, Tensor teacher_pairs)");

  // The gradient of the features, [B, d] in their dtype: grad_loss * sum_j pairs[i, j] (x_i - x_j).
  m.def("relation_backward(Tensor features, Tensor pairs, Tensor grad_loss) -> Tensor");
}
