// From an alias table to a training batch. Semantics: fastkd/ops/batch.py; maths: alias/math.h, crop/math.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // `count` draws of the stream, as alias_sample gives them, and a crop of each image drawn, of `padding` pixels of zeros
  // around it: at the places of crop_seed, mirrored, normalised, as crop_offsets and crop give them.
  // images: uint8 [N, C, H, W], one for each item of the table. -> batch [count, C, height, width] of dtype, indices int64
  // [count].
  m.def(
      "draw_batch(Tensor table, Tensor block_weight, Tensor top, Tensor table_scale, Tensor stream, Tensor crop_seed, "
      "Tensor images, SymInt count, SymInt height, SymInt width, SymInt padding, float flip_probability, "
      "float[] center, float[] scale, ScalarType dtype, Tensor? numbers=None) -> (Tensor batch, Tensor indices)");
}
