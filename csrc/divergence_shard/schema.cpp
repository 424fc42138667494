// The operators of divergences whose classes lie on several ranks. Semantics: fastkd/ops/divergence_shard.py; maths:
// divergence/math.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // What a rank finds in its part of rows of logits [rows, classes]; between these three the ranks exchange what they found.
  // weight, temperatures: [rows], float64; rows of weight 0 are not looked at. kind as in fastkd::divergence, where y is the side
  // that the divergence goes to (for 2 the student) and x the one it comes from.
  //
  // sums [6, rows], float64: the maxima of y and x; relative to these the sums of e^(y / T), of e^(x / T), of the divergence's
  // terms (kinds 0, 1 and 3), and, with `task`, of e^student.
  m.def(
      "divergence_shard_sums(Tensor student_logits, Tensor teacher_logits, Tensor weight, Tensor temperatures, int kind, "
      "bool task) -> Tensor sums");

  // From the sums of all ranks, this one's part: for kinds 0, 1 and 3 of the divergence, and 1, where the sums make it so small
  // that they have lost its digits, or not finite; else 0 and 0; for kind 2 of KL(q || m) and KL(p || m). terms [2, rows],
  // float64.
  m.def(
      "divergence_shard_terms(Tensor student_logits, Tensor teacher_logits, Tensor weight, Tensor temperatures, Tensor sums, "
      "int kind, float beta) -> Tensor terms");

  // From sums of all ranks, and the divergence, or for kind 2 both KLs, in `terms`: the gradients of the sum over rows, which may
  // take the place of the logits. label [rows]: the class of the cross-entropy among this rank's, or -1.
  m.def(
      "divergence_shard_gradients_(Tensor student_logits, Tensor teacher_logits, Tensor weight, Tensor temperatures, "
      "Tensor label, Tensor sums, Tensor terms, int kind, float beta, float kd_scale, float task_scale, "
      "Tensor(a!)? student_gradient, Tensor(b!)? teacher_gradient) -> ()");
}
