// What the tests ask of the CUDA kernels of crop beyond the operators: the 64-bit paths at small sizes, and where threads are
// in tensors that no machine holds.
#include "crop/backward.cuh"
#include "crop/forward_kernels.cuh"
#include "crop/operator.h"

namespace fastkd::crop {
namespace {

Tensor crop_narrow(Tensor images, Tensor offsets, std::optional<Tensor> flip, int64_t height, int64_t width,
                   std::vector<double> center, std::vector<double> scale, ScalarType dtype, int64_t narrow) {
  const DeviceContext context(images);
  const CropCall call = make_crop(context, images, offsets, flip, height, width, center, scale, dtype);
  if (call.out.numel() == 0) return call.out;
  const PlacedConstants placed = place_constants(context, center, scale, images.size(1));
  const ForwardPlan plan = plan_forward(call.params, call.images.size(0), placed.constants, 1, narrow);
  context.launch("crop", plan.kernel, plan.launch, plan.params);
  return call.out;
}

// With tiles and boxes of no more than so many bytes and elements, and so many tiles a warp, if not 0.
Tensor crop_backward_within(Tensor grad_patches, Tensor offsets, std::optional<Tensor> flip, int64_t height, int64_t width,
                            std::vector<double> scale, int64_t tile_bytes, int64_t box, int64_t rounds) {
  const DeviceContext context(grad_patches);
  const CropBackwardCall call = make_crop_backward(context, grad_patches, offsets, flip, height, width, scale);
  if (call.out.numel() == 0) return call.out;
  const PlacedConstants placed = place_constants(context, {}, scale, grad_patches.size(1));
  const BackwardPlan plan = plan_backward(call.params, call.out.size(0), placed.constants, {1, tile_bytes, box, rounds});
  context.launch("crop_backward", plan.kernel, plan.launch, plan.params);
  return call.out;
}

Tensor numbers(std::initializer_list<int64_t> values) {
  Tensor result = empty_cpu({static_cast<int64_t>(values.size())}, ScalarType::Long);
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

// sizes: images, patches of each, planes, unit, image height and width, patch height and width
crop::Geometry geometry_of(const Tensor& offsets, const std::vector<int64_t>& s) {
  return {s[1], s[2], s[3], s[4], s[5], s[6], s[7], static_cast<const int64_t*>(offsets.const_data_ptr()), nullptr};
}

// Of a thread of a launch that copies elements of 4 bytes from packed images: its vector's index in the output, the elements
// of its first piece, their row and plane, the first one's byte in the images; and how the further parts follow.
Tensor crop_where(Tensor offsets, std::vector<int64_t> sizes, int64_t block, int64_t round, int64_t thread) {
  CropParams call{};
  call.geometry = geometry_of(offsets, sizes);
  const crop::Geometry& g = call.geometry;
  call.in_size = call.out_size = 4;
  call.row_stride = g.image_width * g.unit;
  call.plane_stride = g.image_height * call.row_stride;
  call.image_stride = g.planes * call.plane_stride;
  const ForwardPlan plan = plan_forward(call, sizes[0], {}, 132);
  const ForwardParams& p = plan.params;
  const Block<kVectorAxes> b = block_of(p, block, 4);
  const unsigned local = static_cast<unsigned>((round * kThreads + thread) * 4);
  const NarrowDigits<kVectorAxes> at = p.radix.advance(b.base, local);
  const Piece piece = piece_of<uint32_t, 4>(p, b.base, at, origin_of(p, GivenPlaces{p.call.geometry}, b.base, at), 0);
  return numbers({b.index(local, piece.part), piece.end, piece.row, piece.plane, piece.offset, p.is_narrow, p.repeats, p.part,
                  p.source_step, p.rounds, plan.launch.blocks, p.total});
}

// Of a tile of a gradient of float32: image, plane, row and column where it begins, planes, rows, columns, its first element in
// the gradient. Of what patch `patch` at offsets adds: the first element, its row and column in the tile, elements, those
// of a wide box, whether it is mirrored and looked at element by element. Then tiles, elements of a box's planes, rows and
// columns.
Tensor crop_backward_where(Tensor offsets, std::vector<int64_t> sizes, bool flip, int64_t index, int64_t patch) {
  CropBackwardParams call{};
  call.geometry = geometry_of(offsets, sizes);
  call.size = 4;
  const BackwardPlan plan = plan_backward(call, sizes[0], {}, {132});
  const BackwardParams& p = plan.params;
  const Tile t = tile_of(p, p.radix.split(index));
  const int64_t* const at = static_cast<const int64_t*>(offsets.const_data_ptr());
  const Visit v =
      p.is_narrow ? visit_of<int>(p, t, patch, {at[0], at[1], flip}) : visit_of<int64_t>(p, t, patch, {at[0], at[1], flip});
  return numbers({t.image, t.plane, t.row, t.column, t.planes, t.rows, t.columns, out_of(p, t), v.source, v.row(), v.column(),
                  v.elements(), v.wide(), (v.amount & Visit::kMirrored) != 0, (v.amount & Visit::kClipped) != 0, p.tiles,
                  p.planes, p.box_rows, p.box_columns});
}

int64_t divide(int64_t n, int64_t divisor, bool narrow) {
  if (narrow) return Divisor<uint32_t>(static_cast<uint32_t>(divisor)).quotient(static_cast<uint32_t>(n));
  return static_cast<int64_t>(Divisor<uint64_t>(static_cast<uint64_t>(divisor)).quotient(static_cast<uint64_t>(n)));
}

// An index, and the one `step` further on where step >= 0, as coordinates on three axes and the rest.
Tensor radix(std::vector<int64_t> sizes, int64_t index, int64_t step) {
  const Radix<3> axes({sizes[0], sizes[1], sizes[2]});
  const Digits<3> from = axes.split(index);
  if (step < 0) return numbers({from.at[0], from.at[1], from.at[2], from.at[3]});
  const NarrowDigits<3> to = axes.advance(from, static_cast<uint32_t>(step));
  return numbers({to.at[0], to.at[1], to.at[2], from.at[3] + to.over[2]});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd_emulated, m) {
  m.def(
      "crop_narrow(Tensor images, Tensor offsets, Tensor? flip, int height, int width, float[] center, float[] scale, "
      "ScalarType dtype, int narrow) -> Tensor");
  m.def(
      "crop_backward_within(Tensor grad_patches, Tensor offsets, Tensor? flip, int height, int width, float[] scale, "
      "int tile_bytes, int box, int rounds) -> Tensor");
  m.def("crop_where(Tensor offsets, int[] sizes, int block, int round, int thread) -> Tensor");
  m.def("crop_backward_where(Tensor offsets, int[] sizes, bool flip, int tile, int patch) -> Tensor");
  m.def("divide(int n, int divisor, bool narrow) -> int");
  m.def("radix(int[] sizes, int index, int step) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CPU, m) {
  m.impl("crop_narrow", TORCH_BOX(&crop_narrow));
  m.impl("crop_backward_within", TORCH_BOX(&crop_backward_within));
  m.impl("crop_where", TORCH_BOX(&crop_where));
  m.impl("crop_backward_where", TORCH_BOX(&crop_backward_where));
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CompositeExplicitAutograd, m) {
  m.impl("divide", TORCH_BOX(&divide));
  m.impl("radix", TORCH_BOX(&radix));
}

}  // namespace fastkd::crop
