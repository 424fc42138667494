// Long ways through rows: chunks of packs, all on their way at once, and what is left over.
#pragma once

#include "common/row.cuh"

namespace fastkd::FASTKD_ISA::device {

// How a row is shared: chunks of kSpan packs for the neighbouring lanes of each warp, in turn, of which a lane has kPacks,
// kLanes apart; and one by one the loose elements: ragged ends, and all where packs of the row are not aligned.
template <typename T, typename Index, class Group, int kPacks>
struct Chunks {
  static constexpr int kLanes = static_cast<int>(Group::kNeighbours), kSpan = kLanes * kPacks;

  const RowView<T, Index> row;  // the one that says where parts begin
  Index end;                    // of the parts that are whole packs
  int lane;
  Index first, step;        // parts: this lane's first ones of its chunks
  Index head, tail, loose;  // loose elements: those before `head` and from `tail` on, so many

  FASTKD_DEVICE Chunks(const RowView<T, Index>& of, bool present, bool packs, const Group& group) : row(of) {
    const Index begin = row.shift != 0;
    end = present && packs ? (row.count + row.shift) / kPack<T> : 0;
    lane = static_cast<int>(group.index() % kLanes);
    first = begin + static_cast<Index>(group.index() / kLanes) * kSpan + lane;
    step = static_cast<Index>(group.size()) * kPacks;
    head = end > begin ? row.first(begin) : 0;
    tail = end > begin ? row.first(end) : 0;
    loose = present ? head + row.count - tail : 0;
  }
  FASTKD_DEVICE bool has(Index part) const { return part - lane < end; }  // the chunk has a pack, of whatever lane
  // How many parts of the chunk there are from this lane's first on: v * kLanes < left where its pack v is. At most kSpan.
  FASTKD_DEVICE int left(Index part) const {
    const Index rest = end - part;
    return static_cast<int>(rest < kSpan ? rest : kSpan);
  }
  // -inf where the lane has no pack
  template <bool kLast>
  FASTKD_DEVICE void load(const T* data, Index part, int left, Words<T> (&packs)[kPacks]) const {
    const T* const at = data + row.first(part);
    const auto load_packs = [&](const auto& inside) {
#pragma unroll
      for (int v = 0; v < kPacks; ++v) packs[v] = row.template load_whole<kLast>(at + v * kLanes * kPack<T>, inside(v));
    };
    if (left + lane >= kSpan) {
      load_packs([](int) { return true; });
    } else {
      load_packs([&](int v) { return v * kLanes < left; });
    }
  }
  FASTKD_DEVICE Index loose_element(Index n) const { return n < head ? n : n - head + tail; }
  FASTKD_DEVICE bool is_loose(Index i) const { return i < head || i >= tail; }
};

}  // namespace fastkd::FASTKD_ISA::device
