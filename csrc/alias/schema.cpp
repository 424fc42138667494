// The operators of the alias table. Semantics: fastkd/ops/alias.py; maths: math.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // ln(iqpr) / (Q3 - Q1) of the scores that are not -inf, float64 []; 0 where the quartiles coincide.
  m.def("alias_inverse_temperature(Tensor scores, float iqpr, Tensor? numbers=None) -> Tensor");

  // Table of softmax(inverse_temperature * scores): bins int64 [N], block weights int64 [blocks], top table int64 [blocks, 2],
  // scale float64 [4] = (reference score, kappa, exponent, total weight).
  m.def(
      "alias_build(Tensor scores, Tensor inverse_temperature) "
      "-> (Tensor table, Tensor block_weight, Tensor top, Tensor scale)");

  // scores[indices] = new scores: rebuilds the blocks of these items and the top table, in place. Of equal indices the last wins.
  m.def(
      "alias_update_(Tensor(a!) table, Tensor(b!) block_weight, Tensor(c!) top, Tensor(d!) scale, Tensor indices, Tensor scores) "
      "-> ()");

  // int64 [count]: the draws number stream[1] + offset + i * stride of the seed stream[0].
  m.def(
      "alias_sample(Tensor table, Tensor block_weight, Tensor top, Tensor scale, Tensor stream, SymInt count, SymInt offset, "
      "SymInt stride) -> Tensor");

  // The exact fixed-point weight of each item, read off the bins: int64 [N]; probability = weight / their sum.
  m.def("alias_weights(Tensor table, Tensor block_weight) -> Tensor");
}
