// The operators of sparse teachers. Semantics: fastkd/ops/sparse.py; maths: math.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // Per-row divergences of softmaxed logits [rows, classes] from log-probabilities of k classes of each row [rows, k], reduced,
  // with the gradient of the reduced loss; as fastkd::divergence. kind: 0 forward KL, 1 reverse KL, 2 Jensen-Shannon.
  // tail: what becomes of the other classes: 0 bucket, 1 renormalize, 2 drop. teacher_tail_log_prob [rows]: theirs, for 0.
  // Gradients are scaled by fastkd::divergence_backward_.
  m.def(
      "sparse_divergence(Tensor student_logits, Tensor teacher_indices, Tensor teacher_log_probs, Tensor? teacher_tail_log_prob, "
      "Tensor? target, Tensor? weight, Tensor? temperatures, float temperature, int kind, int tail, float beta, float kd_scale, "
      "float task_scale, SymInt ignore_index, int reduction, bool student_gradient, Tensor? numbers=None) "
      "-> (Tensor loss, Tensor terms, Tensor student_gradient)");

  // `draws` classes of each row of softmax(teacher_logits / temperature) [rows, classes], with replacement, repeated ones merged:
  // classes in increasing order, and log(count / draws), both [rows, draws]; behind them -inf. One number as seed.
  m.def(
      "sample_teacher(Tensor teacher_logits, Tensor seed, SymInt draws, float temperature, Tensor? numbers=None) "
      "-> (Tensor indices, Tensor log_probs)");
}
