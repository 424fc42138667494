// What the tests ask of draw_batch on the GPU beyond the operator: its 64-bit path and its long runs at small sizes, and where
// threads are in batches and collections that no machine holds.
#include "batch/draw.cuh"

namespace fastkd::batch {
namespace {

std::tuple<Tensor, Tensor> draw_batch_within(Tensor table, Tensor block_weight, Tensor top, Tensor table_scale, Tensor stream,
                                             Tensor crop_seed, Tensor images, int64_t count, int64_t height, int64_t width,
                                             int64_t padding, double flip_probability, std::vector<double> center,
                                             std::vector<double> scale, ScalarType dtype, int64_t narrow) {
  const DeviceContext context(table);
  const DrawBatchCall call = make_draw_batch(context, table, block_weight, top, table_scale, stream, crop_seed, images, count,
                                             height, width, padding, flip_probability, center, scale, dtype);
  launch_draw_batch(context, call, center, scale, {1, narrow});
  return {call.patches.out, call.indices};
}

// sizes: items, batch, planes, image height and width, crop height and width. Of a thread of a launch to float32 whose image
// is `item` of packed images at (y, x): its vector's index in the batch, the elements of its first piece, their row and
// plane, the first one's byte in the collection; the first image that the block meets and how many at most; elements of an
// image's first parts, elements of them all, of a part, parts, rounds and blocks.
Tensor draw_batch_where(std::vector<int64_t> sizes, std::vector<int64_t> item, int64_t block, int64_t round, int64_t thread) {
  CropParams call{};
  call.geometry = crop::geometry_of(1, sizes[2], false, sizes[3], sizes[4], sizes[5], sizes[6]);
  call.convert = true;
  call.in_dtype = Dtype::kUInt8, call.in_size = 1;
  call.out_dtype = Dtype::kFloat32, call.out_size = 4;
  call.row_stride = sizes[4];
  call.plane_stride = sizes[3] * sizes[4];
  call.image_stride = sizes[2] * call.plane_stride;
  const DrawBatchPlan plan = plan_draw_batch(call, sizes[1], sizes[0], {}, {132});
  const ForwardParams& p = plan.params.crop;
  const Block<kVectorAxes> b = block_of(p, block, 4);
  const unsigned local = static_cast<unsigned>((round * kThreads + thread) * 4);
  const Drawn drawn{2 * item[0], static_cast<int32_t>(item[1]), static_cast<int32_t>(item[2])};
  const Piece piece = piece_of<uint8_t, 4>(p, b.base, p.radix.advance(b.base, local), drawn, 0);
  const int64_t values[] = {
      b.index(local, piece.part), piece.end, piece.row, piece.plane, piece.offset, b.base.at[kVectorAxes], plan.params.most,
      plan.params.elements,       p.total,   p.part,    p.repeats,   p.rounds,     plan.launch.blocks};
  Tensor result = empty_cpu({static_cast<int64_t>(std::size(values))}, ScalarType::Long);
  std::copy(std::begin(values), std::end(values), static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd_emulated, m) {
  m.def(
      "draw_batch_within(Tensor table, Tensor block_weight, Tensor top, Tensor table_scale, Tensor stream, Tensor crop_seed, "
      "Tensor images, int count, int height, int width, int padding, float flip_probability, float[] center, float[] scale, "
      "ScalarType dtype, int narrow) -> (Tensor batch, Tensor indices)");
  m.def("draw_batch_where(int[] sizes, int[] item, int block, int round, int thread) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CPU, m) { m.impl("draw_batch_within", TORCH_BOX(&draw_batch_within)); }
STABLE_TORCH_LIBRARY_IMPL(fastkd_emulated, CompositeExplicitAutograd, m) {
  m.impl("draw_batch_where", TORCH_BOX(&draw_batch_where));
}

}  // namespace fastkd::batch
