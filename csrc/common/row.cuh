// Rows of any length and alignment, 16 bytes at a time.
//
// Parts of a row are counted from the last 16-byte boundary at or before the first element of the row that is written
// (where none is written, read), so that its inner parts are whole packs. `shift` is how many elements of the first part
// lie before the row. Other tensors of the same row whose elements lie on the same boundaries, which is the rule, move in
// packs too; the rest, and ragged ends, move element by element.
#pragma once

#include "common/device.cuh"

namespace fastkd::FASTKD_ISA::device {

template <typename T>
FASTKD_DEVICE int shift_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// -inf: what stands behind the end of a row of logits
FASTKD_DEVICE float lowest(float) { return -__builtin_inff(); }
FASTKD_DEVICE double lowest(double) { return -__builtin_inf(); }
FASTKD_DEVICE BFloat16 lowest(BFloat16) { return {0xff80}; }
FASTKD_DEVICE Float16 lowest(Float16) { return {0xfc00}; }

// A row of `count` elements as parts; null rows are never loaded or stored. Index: int where rows are known to be short,
// which spares registers, else int64_t.
template <typename T, typename Index>
struct RowView {
  T* data;
  Index count;
  int shift;
  bool packs;  // inner parts are 16-byte aligned

  FASTKD_DEVICE RowView(const T* row, Index elements, int parts_shift)
      : data(const_cast<T*>(row)),
        count(elements),
        shift(parts_shift),
        packs((reinterpret_cast<uintptr_t>(row) - parts_shift * sizeof(T)) % 16 == 0) {}

  FASTKD_DEVICE Index parts() const { return (count + shift + kPack<T> - 1) / kPack<T>; }
  FASTKD_DEVICE Index first(Index part) const { return part * kPack<T> - shift; }
  FASTKD_DEVICE bool whole(Index begin) const { return packs && begin >= 0 && begin + kPack<T> <= count; }
  FASTKD_DEVICE bool all_packs() const { return packs && shift == 0 && count % kPack<T> == 0; }  // no ragged end, none unaligned

  // -inf outside of the row; kLast: nobody will read it again
  template <bool kLast = false>
  FASTKD_DEVICE Words<T> load_words(Index part) const {
    const Index begin = first(part);
    const auto* const from = reinterpret_cast<const Word*>(data + begin);
    Pack<Word> raw;
    if (whole(begin)) {
      raw = kLast ? load_pack_once(from) : load_pack(from);
    } else if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int w = 0; w < kPack<Word>; ++w) {
        const Index i = begin + 2 * w;
        const T low = i >= 0 && i < count ? data[i] : lowest(T{});
        const T high = i + 1 >= 0 && i + 1 < count ? data[i + 1] : lowest(T{});
        raw.value[w] = low.bits | static_cast<unsigned>(high.bits) << 16;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const Index i = begin + k;
        raw.value[k] = i >= 0 && i < count ? data[i] : lowest(T{});
      }
    }
    return words_of(raw);
  }
  template <bool kLast = false>
  FASTKD_DEVICE Pack<T> load(Index part) const {
    const Words<T> words = load_words<kLast>(part);
    Pack<T> pack;
    memcpy(&pack, &words, sizeof pack);
    return pack;
  }
  // A whole pack: few instructions, where `at` differs from pack to pack by a constant. -inf if not `inside`.
  template <bool kLast = false>
  FASTKD_DEVICE static Words<T> load_whole(const T* at, bool inside) {
    const auto* const from = reinterpret_cast<const Word*>(at);
    Pack<Word> raw;
    if (inside) {
      raw = kLast ? load_pack_once(from) : load_pack(from);
    } else {
#pragma unroll
      for (int w = 0; w < kPack<Word>; ++w) raw.value[w] = lowest_word();
    }
    return words_of(raw);
  }
  FASTKD_DEVICE void store(Index part, const Pack<T>& pack) const {
    const Index begin = first(part);
    if (whole(begin)) return store_pack_once(data + begin, pack);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const Index i = begin + k;
      if (i >= 0 && i < count) data[i] = pack.value[k];
    }
  }

 private:
  using Word = typename Words<T>::Word;
  static FASTKD_DEVICE Words<T> words_of(const Pack<Word>& raw) {
    Words<T> words;
    memcpy(&words, &raw, sizeof words);
    return words;
  }
  static FASTKD_DEVICE Word lowest_word() {
    if constexpr (sizeof(T) == 2) {
      return lowest(T{}).bits * 0x10001u;
    } else {
      return lowest(T{});
    }
  }
};

}  // namespace fastkd::FASTKD_ISA::device
