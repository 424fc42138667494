// Moments of channels on the GPU: checks, outputs, launches; and how parts become results.
#include "common/launch.cuh"
#include "moments/cuda_moments.cuh"
#include "moments/operator.h"

namespace fastkd::moments {
namespace {

using namespace device;
using namespace FASTKD_ISA::moments;

// Merges the parts of kMergeWidth channels. Sums are relative to the first part of each thread, in double.
FASTKD_KERNEL(kThreads)
merge_parts(const DeviceParams p) {
  constexpr unsigned kHeight = kThreads / kMergeWidth;
  const int64_t channels = p.maps.channels, panels = (channels + kMergeWidth - 1) / kMergeWidth;
  const int64_t result = block_index() / panels;
  const int64_t channel = block_index() % panels * kMergeWidth + thread_index() % kMergeWidth;
  const int64_t parts = p.pieces * (p.maps.channels_last ? 1 : p.maps.outer);
  const double whole = static_cast<double>(p.piece), last = static_cast<double>(p.maps.pixels - (p.pieces - 1) * p.piece);
  const double* const means = p.part_mean + result * parts * channels + channel;
  const double* const m2s = p.part_m2 + result * parts * channels + channel;
  double count = 0, first = 0, sum = 0, square = 0;
  const int64_t y = thread_index() / kMergeWidth, end = channel < channels ? parts : 0;
  if (y < end) first = means[y * channels];
#pragma unroll 4
  for (int64_t part = y; part < end; part += kHeight) {
    const double numbers = (part + 1) % p.pieces == 0 ? last : whole;
    const double difference = means[part * channels] - first, all = numbers * difference;
    count += numbers;
    sum += all;
    square += m2s[part * channels] + all * difference;
  }
  double mean[1] = {0}, m2[1] = {0};
  if (count > 0) from_sums(first, sum, square, 1 / count, mean[0], m2[0]);
  merge_over_height(kMergeWidth, kHeight, count, mean, m2);
  if (y != 0 || end == 0) return;
  const int64_t at = result * channels + channel;
  if (p.maps.dtype == Dtype::kFloat64) {
    static_cast<double*>(p.mean)[at] = mean[0];
    static_cast<double*>(p.var)[at] = m2[0] / count;
  } else {
    static_cast<float*>(p.mean)[at] = static_cast<float>(mean[0]);
    static_cast<float*>(p.var)[at] = static_cast<float>(m2[0] / count);
  }
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

std::tuple<Tensor, Tensor> channel_moments(Tensor x, bool per_sample) {
  check_maps(x);
  const DeviceContext context(x);
  x = packed(x);
  Tensor mean = empty_result(context, x, per_sample), var = empty_result(context, x, per_sample);
  const Maps maps = maps_of(x, per_sample);
  const DevicePlan plan = plan_device(maps, static_cast<int64_t>(x.element_size()), is_aligned(maps.data), context.limits());
  const int64_t parts = maps.outer * plan.pieces;
  const bool direct = (maps.channels_last ? plan.pieces : parts) == 1;
  const Tensor memory = context.empty({direct ? 0 : 2 * parts * maps.channels}, ScalarType::Double);
  DeviceParams params{
      maps, plan.piece, plan.pieces, plan.width, plan.height, nullptr, nullptr, mean.mutable_data_ptr(), var.mutable_data_ptr()};
  if (!direct) {
    params.part_mean = static_cast<double*>(memory.mutable_data_ptr());
    params.part_m2 = params.part_mean + parts * maps.channels;
  }
  const ForwardKernel kernel = maps.channels_last ? columns_kernel(maps.dtype, plan.packs) : rows_kernel(maps.dtype, plan.team);
  context.launch("channel_moments", kernel, plan.geometry, params);
  if (!direct) {
    const int64_t results = maps.channels_last ? maps.outer : 1;
    const Geometry geometry{one_cluster_each("channels", results * pieces_of(maps.channels, kMergeWidth), 1), kThreads, 1,
                            3 * kThreads * sizeof(double)};
    context.launch("channel_moments", merge_parts, geometry, params);
  }
  return {mean, var};
}

Tensor channel_moments_backward(Tensor x, Tensor mean, std::optional<Tensor> grad_mean, std::optional<Tensor> grad_var) {
  const DeviceContext context(x);
  const Gradients in(x, mean, grad_mean, grad_var);
  Tensor gradient = empty_gradient(context, in.x);
  const Maps maps = maps_of(in.x, in.per_sample);
  const DevicePlan plan = plan_device(maps, static_cast<int64_t>(in.x.element_size()), is_aligned(maps.data), context.limits());
  const DeviceBackwardParams params{maps,
                                    plan.piece,
                                    plan.pieces,
                                    plan.width,
                                    plan.height,
                                    1 / static_cast<double>(maps.count()),
                                    in.mean.const_data_ptr(),
                                    data_or_null<void>(in.grad_mean),
                                    data_or_null<void>(in.grad_var),
                                    gradient.mutable_data_ptr()};
  Geometry geometry = plan.geometry;
  geometry.shared_bytes = 0;
  const BackwardKernel kernel =
      maps.channels_last ? columns_backward_kernel(maps.dtype, plan.packs) : rows_backward_kernel(maps.dtype, plan.team);
  context.launch("channel_moments_backward", kernel, geometry, params);
  return gradient;
}

}  // namespace

FASTKD_CUDA_IMPL(m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments));
  m.impl("channel_moments_backward", TORCH_BOX(&channel_moments_backward));
}

}  // namespace fastkd::moments
