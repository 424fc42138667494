// Draws from a teacher's distribution on the GPU: the bits of the CPU's, see draws.h.
//
// Mapping: a block takes a row, which is cut into at most 1024 chunks of a multiple of 32 classes. (1) The maximum. (2) A warp
// sums the weights of a chunk; the sums before each chunk stand in shared memory. (3) A warp takes a draw: by bisection its
// chunk, then 32 classes at a time, by a prefix sum over the lanes. (4) Draws of the same class are counted, and classes ranked,
// by comparing all pairs: few draws are the rule. The row is read three times, from the L2 cache after the first.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "divergence/cuda_math.cuh"
#include "sparse/draws.h"
#include "sparse/operator.h"

namespace fastkd::sparse {
namespace {

using namespace device;
using namespace alias_math;

constexpr unsigned kDrawThreads = 256;
constexpr unsigned kMostChunks = 1024;
constexpr unsigned kReductionBytes = 2 * 8 * kDrawThreads / kWarp;  // of one number in turns

struct DrawParams {
  const void* logits;
  int64_t stride, classes, chunk;  // of classes
  unsigned chunks;
  double kappa;
  int exponent;
  int64_t draws;
  const int64_t* seed;
  int64_t* drawn;  // [rows, 2, draws]: the class of each draw, how many there are of it, where it is the first
  int64_t* indices;
  float* log_probs;
};

template <typename T>
FASTKD_DEVICE void draw_row(const DrawParams& p, int64_t row) {
  const T* const logits = static_cast<const T*>(p.logits) + row * p.stride;
  LoopClusterGroup<1> group;
  const Shared<uint64_t> before(kReductionBytes, kMostChunks + 1);  // the weight before each chunk; of all
  const unsigned self = thread_index(), warps = kDrawThreads / kWarp;
  double top[1] = {-kInfinity<double>}, invalid[1] = {0};
  for (int64_t c = self; c < p.classes; c += kDrawThreads) {
    const double logit = static_cast<double>(to_compute(logits[c]));
    if (!(logit < kInfinity<double>)) invalid[0] = 1;
    top[0] = maximum(top[0], logit);
  }
  group.reduce(top, Max{});
  group.reduce(invalid, Sum{});
  const auto weight = [&](int64_t c) {
    if (c >= p.classes) return uint64_t{0};
    return weight_of(power_of(static_cast<double>(to_compute(logits[c])), top[0], p.kappa), p.exponent, 0);
  };
  int64_t* const indices = p.indices + row * p.draws;
  float* const log_probs = p.log_probs + row * p.draws;
  if (invalid[0] != 0 || !(top[0] > -kInfinity<double>)) {  // what the CPU refuses
    for (int64_t i = self; i < p.draws; i += kDrawThreads) {
      indices[i] = 0;
      log_probs[i] = __builtin_nanf("");
    }
    return;
  }
  for (unsigned chunk = warp_index(); chunk < p.chunks; chunk += warps) {
    const int64_t begin = static_cast<int64_t>(chunk) * p.chunk;
    uint64_t sum[1] = {0};
    for (int64_t c = begin + lane_index(); c < begin + p.chunk; c += kWarp) sum[0] += weight(c);
    reduce_lanes<kWarp>(sum, Sum{});
    if (lane_index() == 0) before.store(chunk + 1, sum[0]);
  }
  block_barrier();
  if (self == 0) {
    uint64_t sum = 0;
    before.store(0, sum);
    for (unsigned chunk = 1; chunk <= p.chunks; ++chunk) {
      sum += before.load(chunk);
      before.store(chunk, sum);
    }
  }
  block_barrier();
  const uint64_t total = before.load(p.chunks), seed = static_cast<uint64_t>(*p.seed);
  int64_t* const drawn = p.drawn + row * 2 * p.draws;
  int64_t* const counts = drawn + p.draws;
  for (int64_t i = warp_index(); i < p.draws; i += warps) {
    const uint64_t place = sparse_draws::place_of(seed, row, p.draws, i, total);
    unsigned low = 0, high = p.chunks;  // before(low) <= place < before(high)
    while (high - low > 1) {
      const unsigned middle = (low + high) / 2;
      if (before.load(middle) <= place) {
        low = middle;
      } else {
        high = middle;
      }
    }
    uint64_t behind = before.load(low);
    for (int64_t c = static_cast<int64_t>(low) * p.chunk;; c += kWarp) {
      uint64_t end = weight(c + lane_index());
      for (unsigned step = 1; step < kWarp; step *= 2) {  // over the lanes up to this one
        const uint64_t other = shuffle(end, lane_index() >= step ? lane_index() - step : lane_index());
        if (lane_index() >= step) end += other;
      }
      const unsigned beyond = ballot(behind + end > place);
      if (beyond != 0) {
        if (lane_index() == 0) drawn[i] = c + lowest_bit(beyond);
        break;
      }
      behind += shuffle(end, kWarp - 1);
    }
  }
  block_barrier();
  double made[1] = {0};
  for (int64_t i = self; i < p.draws; i += kDrawThreads) {
    const int64_t c = drawn[i];
    int64_t count = 0;
    bool first = true;
    for (int64_t j = 0; j < p.draws; ++j) {
      const bool same = drawn[j] == c;
      count += same;
      first = first && !(same && j < i);
    }
    counts[i] = first ? count : 0;
    made[0] += first ? 1 : 0;
  }
  group.reduce(made, Sum{});  // a barrier
  for (int64_t i = self; i < p.draws; i += kDrawThreads) {
    if (i >= static_cast<int64_t>(made[0])) {
      indices[i] = 0;
      log_probs[i] = -kInfinity<float>;
    }
    if (counts[i] == 0) continue;
    int64_t rank = 0;
    for (int64_t j = 0; j < p.draws; ++j) rank += counts[j] != 0 && drawn[j] < drawn[i];
    indices[rank] = drawn[i];
    log_probs[rank] = static_cast<float>(device::log(sparse_draws::share(counts[i], p.draws)));
  }
}

template <typename T>
FASTKD_KERNEL(kDrawThreads)
draw_rows(const DrawParams p) {
  draw_row<T>(p, block_index());
}

std::tuple<Tensor, Tensor> sample_teacher(Tensor teacher, Tensor seed, int64_t draws, double temperature,
                                          std::optional<Tensor> numbers) {
  take_numbers(numbers, temperature);
  check_draws(teacher, seed, draws, temperature);
  const int64_t rows = teacher.size(0), classes = teacher.size(1);
  const DeviceContext context(teacher);
  Tensor indices = context.empty({rows, draws}, ScalarType::Long), log_probs = context.empty({rows, draws}, ScalarType::Float);
  Tensor drawn = context.empty({rows, 2, draws}, ScalarType::Long);
  if (rows == 0) return {indices, log_probs};
  const int64_t chunk = std::max<int64_t>(1024, (classes + kMostChunks * 32 - 1) / (kMostChunks * 32) * 32);
  const DrawParams params{teacher.const_data_ptr(),
                          teacher.stride(0),
                          classes,
                          chunk,
                          static_cast<unsigned>((classes + chunk - 1) / chunk),
                          sparse_draws::kappa_of(temperature),
                          sparse_draws::exponent_of(classes),
                          draws,
                          static_cast<const int64_t*>(seed.const_data_ptr()),
                          static_cast<int64_t*>(drawn.mutable_data_ptr()),
                          static_cast<int64_t*>(indices.mutable_data_ptr()),
                          static_cast<float*>(log_probs.mutable_data_ptr())};
  const auto kernel = for_dtype(kernel_dtype(teacher), []<typename T>() -> void (*)(DrawParams) { return draw_rows<T>; });
  const Geometry geometry{one_cluster_each("rows", rows, 1), kDrawThreads, 1, kReductionBytes + 8 * (kMostChunks + 1)};
  context.launch("sample_teacher", kernel, geometry, params);
  return {indices, log_probs};
}

}  // namespace

FASTKD_CUDA_IMPL(m) { m.impl("sample_teacher", TORCH_BOX(&sample_teacher)); }

}  // namespace fastkd::sparse
