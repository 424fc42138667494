// Moments of rows, the pixels of a channel side by side, and their gradient.
//
// Mapping: a row, or a part of it, belongs to a lane, four, a warp or a block (Team). Each lane takes chunks of kRowPacks packs,
// all on their way at once, in two passes over its registers; ragged ends go one by one. Sums of a chunk are in float, chunks
// are added in double, relative to the mean of the lane's first one; then the sets of all lanes are merged.
// Bytes: the maps once; backward, the maps and the gradient once each.
#include "common/chunks.cuh"
#include "common/reduce.cuh"
#include "moments/cuda_moments.cuh"

namespace fastkd::moments {
namespace {

using namespace device;
using namespace FASTKD_ISA::moments;

// Numbers in double, relative to the first.
struct Gathered {
  double count = 0, first = 0, sum = 0, square = 0;

  FASTKD_DEVICE void add(double numbers, double mean, double m2) {
    if (count == 0) first = mean;
    const double difference = mean - first, all = numbers * difference;
    count += numbers;
    sum += all;
    square += m2 + all * difference;
  }
  FASTKD_DEVICE Moments moments() const {
    Moments result;
    result.count = count;
    if (count > 0) from_sums(first, sum, square, 1 / count, result.mean, result.m2);
    return result;
  }
};

// In pairs, so that many small numbers beside a large one are not all rounded alike.
template <typename S, int N>
FASTKD_DEVICE S sum_of(S (&values)[N]) {
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) values[k] += values[k + half];
  }
  return values[0];
}

// Adds a lane's packs of a chunk, `inside` of them. False where an element is infinite or NaN, or squares are beyond float:
// nothing is added then.
template <typename T, typename Count>
FASTKD_DEVICE bool add_packs(const Words<T> (&packs)[kRowPacks], Count inside, Gathered& to) {
  using S = Compute<T>;
  const S count = static_cast<S>(inside * kPack<T>), inverse = reciprocal(count);
  S values[kPack<T>], sums[kRowPacks] = {}, squares[kRowPacks] = {};
  const auto each = [&](S from, const auto& body) {
#pragma unroll
    for (int v = 0; v < kRowPacks; ++v) {
      if (v >= inside) continue;
      unpack(packs[v], values);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) values[k] -= from;
      body(v);
    }
  };
  unpack(packs[0], values);
  const S first = values[0];
  each(first, [&](int v) { sums[v] = sum_of(values); });
  const S shift = first + sum_of(sums) * inverse;
#pragma unroll
  for (int v = 0; v < kRowPacks; ++v) sums[v] = 0;
  each(shift, [&](int v) {
    S own[kPack<T>];
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) own[k] = values[k] * values[k];
    squares[v] = sum_of(own);
    sums[v] = sum_of(values);
  });
  const S square = sum_of(squares);
  if (!(square < kInfinity<S>)) return false;
  double mean, m2;
  from_sums(static_cast<double>(shift), static_cast<double>(sum_of(sums)), static_cast<double>(square),
            static_cast<double>(inverse), mean, m2);
  to.add(static_cast<double>(count), mean, m2);
  return true;
}
// Those v with v * kLanes < left.
template <typename T, int kLanes>
FASTKD_DEVICE bool add_chunk(const Words<T> (&packs)[kRowPacks], int left, Gathered& to) {
  if (left > (kRowPacks - 1) * kLanes) return add_packs<T>(packs, Whole<kRowPacks>(), to);
  return left <= 0 || add_packs<T>(packs, (left + kLanes - 1) / kLanes, to);
}

// Those of the lanes of a group, merged into the first one's.
template <class Group>
FASTKD_DEVICE void merge_lanes(Moments& own) {
  const auto within = [&](unsigned lanes) {
    for (unsigned mask = lanes / 2; mask > 0; mask /= 2) {
      Moments other;
      other.count = shuffle_xor(own.count, mask);
      other.mean = shuffle_xor(own.mean, mask);
      other.m2 = shuffle_xor(own.m2, mask);
      own.add(other);
    }
  };
  within(Group::kNeighbours);
  if constexpr (Group::kWholeCluster) {
    const unsigned warps = thread_count() / kWarp;
    if (warps == 1) return;
    const Shared<double> slots(0, 3 * warps);
    if (lane_index() == 0) {
      slots.store(warp_index(), own.count);
      slots.store(warps + warp_index(), own.mean);
      slots.store(2 * warps + warp_index(), own.m2);
    }
    block_barrier();
    if (thread_index() != 0) return;
    for (unsigned i = 1; i < warps; ++i) {
      Moments other;
      other.count = slots.load(i);
      other.mean = slots.load(warps + i);
      other.m2 = slots.load(2 * warps + i);
      own.add(other);
    }
  }
}

// Where a row, or a part of it, lies. A team may have none. Those of lanes are whole, and fewer than 2^32.
template <class Group, class Params>
struct Place {
  bool present;
  int64_t begin, count;  // of the numbers of x
  int64_t channel, part;

  FASTKD_DEVICE Place(const Params& p, int64_t index) {
    const int64_t rows = p.maps.outer * p.maps.channels * p.pieces;
    present = index < rows;
    const int64_t at = present ? index : 0;
    const bool whole = !Group::kWholeCluster || p.pieces == 1;
    const int64_t row = whole ? at : at / p.pieces, piece = whole ? 0 : at % p.pieces;
    const int64_t sample = p.maps.outer == 1      ? 0
                           : Group::kWholeCluster ? row / p.maps.channels
                                                  : static_cast<unsigned>(row) / static_cast<unsigned>(p.maps.channels);
    const int64_t rest = p.maps.pixels - piece * p.piece;
    begin = row * p.maps.pixels + piece * p.piece;
    count = rest < p.piece ? rest : p.piece;
    channel = row - sample * p.maps.channels;
    part = sample * p.pieces + piece;
  }
};

template <class Group>
constexpr unsigned kThreadsOf = Group::kWholeCluster ? kThreads : kLaneThreads;
// Registers for 768 threads of a multiprocessor, 640 where threads have short rows.
template <class Group>
constexpr unsigned kBlocksOf = (Group::kWholeCluster ? 768 : 640) / kThreadsOf<Group>;
// Indices of rows: those of lanes are short.
template <class Group>
using IndexOf = std::conditional_t<Group::kWholeCluster, int64_t, int>;

// inspect: streaming moments_of_rows<*> loads=128
template <typename T, class Group>
FASTKD_KERNEL(kThreadsOf<Group>, kBlocksOf<Group>)
moments_of_rows(const DeviceParams p) {
  using S = Compute<T>;
  using Index = IndexOf<Group>;
  using Parts = Chunks<T, Index, Group, kRowPacks>;
  const int64_t rows = p.maps.outer * p.maps.channels * p.pieces;
  each_row<Group>(rows, [&](int64_t index, Group& group) {
    const Place<Group, DeviceParams> place(p, index);
    const T* const data = static_cast<const T*>(p.maps.data) + place.begin;
    const RowView<T, Index> row(data, static_cast<Index>(place.count), shift_of(data));
    const Parts chunks(row, place.present, row.packs, group);
    Gathered gathered;
    for (Index part = chunks.first; chunks.has(part); part += chunks.step) {
      const int left = chunks.left(part);
      Words<T> packs[kRowPacks];
      chunks.template load<true>(data, part, left, packs);
      if (add_chunk<T, Parts::kLanes>(packs, left, gathered)) continue;
#pragma unroll 1
      for (int v = 0; v < left; v += Parts::kLanes) {
#pragma unroll 1
        for (Index i = row.first(part + v), k = 0; k < kPack<T>; ++k) {
          gathered.add(1, static_cast<double>(to_compute(data[i + k])), 0);
        }
      }
    }
#pragma unroll 1
    for (Index n = static_cast<Index>(group.index()); n < chunks.loose; n += static_cast<Index>(group.size())) {
      gathered.add(1, static_cast<double>(to_compute(data[chunks.loose_element(n)])), 0);
    }
    Moments own = gathered.moments();
    merge_lanes<Group>(own);
    if (!place.present || group.index() != 0) return;
    write_result<S>(p, place.part * p.maps.channels + place.channel, own.count, own.mean, own.m2);
  });
}

// inspect: streaming gradient_of_rows<*> loads=128 stores=128
template <typename T, class Group>
FASTKD_KERNEL(kThreadsOf<Group>, kBlocksOf<Group>)
gradient_of_rows(const DeviceBackwardParams p) {
  using S = Compute<T>;
  using Index = IndexOf<Group>;
  using Parts = Chunks<T, Index, Group, kRowPacks>;
  const int64_t rows = p.maps.outer * p.maps.channels * p.pieces;
  each_row<Group>(rows, [&](int64_t index, Group& group) {
    const Place<Group, DeviceBackwardParams> place(p, index);
    const T* const data = static_cast<const T*>(p.maps.data) + place.begin;
    T* const gradient = static_cast<T*>(p.gradient) + place.begin;
    const RowView<T, Index> row(data, static_cast<Index>(place.count), shift_of(gradient));
    const Parts chunks(row, place.present, row.packs, group);
    const Slope<S> slope(p, place.channel);
    for (Index part = chunks.first; chunks.has(part); part += chunks.step) {
      const int left = chunks.left(part);
      T* const to = gradient + row.first(part);
      Words<T> packs[kRowPacks];
      chunks.template load<true>(data, part, left, packs);
#pragma unroll
      for (int v = 0; v < kRowPacks; ++v) {
        S values[kPack<T>];
        unpack(packs[v], values);
#pragma unroll
        for (int k = 0; k < kPack<T>; ++k) values[k] = slope(values[k]);
        if (v * Parts::kLanes < left) store_pack_once(to + v * Parts::kLanes * kPack<T>, pack_of<T>(values));
      }
    }
#pragma unroll 1
    for (Index n = static_cast<Index>(group.index()); n < chunks.loose; n += static_cast<Index>(group.size())) {
      const Index i = chunks.loose_element(n);
      gradient[i] = from_compute<T>(slope(to_compute(data[i])));
    }
  });
}

// Calls function<T, Group>() with the type of a dtype and the group of a team.
template <typename Function>
auto for_kind(Dtype dtype, Team team, const Function& function) {
  return for_dtype(dtype, [&]<typename T>() {
    switch (team) {
      case Team::kLane: return function.template operator()<T, LaneGroup<1>>();
      case Team::kFewLanes: return function.template operator()<T, LaneGroup<kFewLanes>>();
      case Team::kWarp: return function.template operator()<T, LaneGroup<kWarp>>();
      default: return function.template operator()<T, ClusterGroup>();
    }
  });
}

}  // namespace

ForwardKernel rows_kernel(Dtype dtype, Team team) {
  return for_kind(dtype, team, []<typename T, class Group>() { return moments_of_rows<T, Group>; });
}
BackwardKernel rows_backward_kernel(Dtype dtype, Team team) {
  return for_kind(dtype, team, []<typename T, class Group>() { return gradient_of_rows<T, Group>; });
}

}  // namespace fastkd::moments
