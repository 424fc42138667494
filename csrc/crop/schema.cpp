// The operators of crop. Semantics: fastkd/ops/crop.py; maths: math.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  // k patches of each image, [B, C, H, W] -> [B * k, C, height, width] in the memory format of images.
  // offsets: int64 [B, k, 2], (y, x) of the top left corner, anywhere: pixels outside the image are 0. flip: bool [B, k],
  // mirrors left to right. Then (pixel - center[c]) * scale[c]; an empty list leaves that step out.
  // dtype: that of images, or a float dtype for uint8 images.
  m.def(
      "crop(Tensor images, Tensor offsets, Tensor? flip, SymInt height, SymInt width, float[] center, float[] scale, "
      "ScalarType dtype, Tensor? numbers=None) -> Tensor");

  // The transpose of crop: [B * k, C, h, w] -> [B, C, height, width]; each pixel sums the patches that cover it, last first.
  m.def(
      "crop_backward(Tensor grad_patches, Tensor offsets, Tensor? flip, SymInt height, SymInt width, float[] scale, Tensor? "
      "numbers=None) "
      "-> Tensor");

  // Uniform offsets y_low <= y < y_low + y_count, x alike, int64 [batch, patches, 2], and flips, bool [batch, patches].
  // seed: int64, one element.
  m.def(
      "crop_offsets(Tensor seed, SymInt batch, SymInt patches, SymInt y_low, SymInt y_count, SymInt x_low, SymInt x_count, "
      "float flip_probability, Tensor? numbers=None) -> (Tensor offsets, Tensor flip)");
}
