// The operators of divergence. Semantics: fastkd/ops/divergence.py; maths: math.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // Per-row divergences of softmaxed logits [rows, classes], reduced, with the gradients of the reduced loss.
  // kind: 0 forward KL, 1 reverse KL, 2 Jensen-Shannon, 3 soft cross-entropy. reduction: 0 none, 1 sum, 2 batchmean, 3 mean.
  // loss = kd_scale * kd + task_scale * task; terms = (task, kd), unscaled. Gradients not asked for are empty.
  m.def(
      "divergence(Tensor student_logits, Tensor teacher_logits, Tensor? target, Tensor? weight, Tensor? temperatures, "
      "float temperature, int kind, float beta, float kd_scale, float task_scale, SymInt ignore_index, int reduction, "
      "bool student_gradient, bool teacher_gradient, Tensor? numbers=None) "
      "-> (Tensor loss, Tensor terms, Tensor student_gradient, Tensor teacher_gradient)");

  // The same in place: gradients of the sum of kd_scale * kd + task_scale * task over all rows take the place of the logits that
  // have been asked for, which must be contiguous. terms [2, rows] = (task, kd) of each row, unscaled.
  m.def(
      "divergence_(Tensor(a!) student_logits, Tensor(b!) teacher_logits, Tensor? target, Tensor? weight, Tensor? temperatures, "
      "float temperature, int kind, float beta, float kd_scale, float task_scale, SymInt ignore_index, "
      "bool student_gradient, bool teacher_gradient, Tensor? numbers=None) -> Tensor terms");

  // gradient[r, :] *= grad_loss (a scalar, or one for each row), in place; nothing is touched where it is 1.
  m.def("divergence_backward_(Tensor(a!) gradient, Tensor grad_loss) -> ()");

  // max, argmax, mean, logsumexp and entropy of each row of logits / temperature: [rows, classes] -> [rows] each.
  m.def(
      "logit_stats(Tensor logits, float temperature, Tensor? numbers=None) "
      "-> (Tensor max, Tensor argmax, Tensor mean, Tensor logsumexp, Tensor entropy)");
  m.def(
      "logit_stats_backward(Tensor logits, float temperature, Tensor argmax, Tensor logsumexp, Tensor entropy, "
      "Tensor? grad_max, Tensor? grad_mean, Tensor? grad_logsumexp, Tensor? grad_entropy, Tensor? numbers=None) -> Tensor");
}
