// Runs of elements at any address, for the CUDA kernels of crop: read in aligned vectors, shifted into place in registers,
// cut to what lies inside, mirrored. Everything is bytes: an element has a size, not a type.
#pragma once

#include <cstring>

#include "common/device.cuh"
#include "common/geometry.h"
#include "common/radix.h"
#include "crop/kernel.h"

namespace fastkd::crop {
namespace {

using namespace device;

constexpr int kRepeats = 4;      // vectors for which a thread works out only once where they come from, at most
constexpr unsigned kRounds = 4;  // of them, one after the other, where there are enough

// Where a block of threads begins in a packed output.
template <int kAxes>
struct Block {
  int64_t first;  // element of the first parts
  Digits<kAxes> base;
  int64_t skipped;  // elements of further parts before it: between one first part and the next lie the others
  int64_t between;

  FASTKD_DEVICE int64_t index(unsigned local, int64_t part) const { return first + skipped + local + part * between; }
};
// Of params with rounds, radix, repeats and part; first_parts(base): how many were begun before.
template <int kAxes, typename Params, typename FirstParts>
FASTKD_DEVICE Block<kAxes> block_of(const Params& p, int64_t block, int vector, const FirstParts& first_parts) {
  Block<kAxes> b;
  b.first = block * p.rounds * (kThreads * vector);
  b.base = p.radix.split(b.first);
  b.between = (p.repeats - 1) * p.part;
  b.skipped = first_parts(b.base) * b.between;
  return b;
}

// kBytes (2, 4, 8 or 16) bytes in registers, the first one lowest.
template <int kBytes>
struct Bytes {
  static constexpr int kCount = kBytes < 4 ? 1 : kBytes / 4;
  uint32_t word[kCount];
};

template <typename To, typename From>
FASTKD_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <int kBytes>
FASTKD_DEVICE Bytes<kBytes> load_bytes(const char* p) {
  if constexpr (kBytes == 16) {
    return bit_cast<Bytes<16>>(load_pack(reinterpret_cast<const uint32_t*>(p)));
  } else if constexpr (kBytes == 8) {
    const uint64_t bits = *reinterpret_cast<const uint64_t*>(p);
    return {{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)}};
  } else if constexpr (kBytes == 4) {
    return {{*reinterpret_cast<const uint32_t*>(p)}};
  } else {
    return {{*reinterpret_cast<const uint16_t*>(p)}};
  }
}

// Element i, a constant after unrolling.
template <typename T, int kBytes>
FASTKD_DEVICE T element(const Bytes<kBytes>& bytes, int i) {
  constexpr int kSize = sizeof(T);
  if constexpr (kSize == 8) {
    return bit_cast<T>(uint64_t{bytes.word[2 * i + 1]} << 32 | bytes.word[2 * i]);
  } else if constexpr (kSize == 4) {
    return bit_cast<T>(bytes.word[i]);
  } else if constexpr (kSize == 2) {
    return bit_cast<T>(static_cast<uint16_t>(bytes.word[i / 2] >> 16 * (i % 2)));
  } else {
    return bit_cast<T>(static_cast<uint8_t>(bytes.word[i / 4] >> 8 * (i % 4)));
  }
}

// Drops the first element and appends one: how a vector is filled in a loop whose index is not a constant.
template <typename T, int kBytes>
FASTKD_DEVICE void push(Bytes<kBytes>& bytes, T value) {
  constexpr int kSize = sizeof(T), kCount = Bytes<kBytes>::kCount;
  if constexpr (kSize == 8) {
    const uint64_t bits = bit_cast<uint64_t>(value);
    for (int i = 0; i < kCount - 2; ++i) bytes.word[i] = bytes.word[i + 2];
    bytes.word[kCount - 2] = static_cast<uint32_t>(bits);
    bytes.word[kCount - 1] = static_cast<uint32_t>(bits >> 32);
  } else if constexpr (kSize == 4) {
    for (int i = 0; i < kCount - 1; ++i) bytes.word[i] = bytes.word[i + 1];
    bytes.word[kCount - 1] = bit_cast<uint32_t>(value);
  } else {
    using Bits = std::conditional_t<kSize == 2, uint16_t, uint8_t>;
    constexpr int kBits = 8 * kSize;
    for (int i = 0; i < kCount - 1; ++i) bytes.word[i] = bytes.word[i] >> kBits | bytes.word[i + 1] << (32 - kBits);
    const uint32_t top = bit_cast<Bits>(value);
    bytes.word[kCount - 1] = bytes.word[kCount - 1] >> kBits | top << ((kBytes < 4 ? 8 * kBytes : 32) - kBits);
  }
}

// Bytes [shift, shift + kBytes) of two vectors in a row; shift < kBytes, a multiple of kSize.
template <int kSize, int kBytes>
FASTKD_DEVICE Bytes<kBytes> shifted(const Bytes<kBytes>& low, const Bytes<kBytes>& high, unsigned shift) {
  if constexpr (kBytes == 2) {
    return {{(low.word[0] | high.word[0] << 16) >> 8 * shift & 0xffffu}};
  } else {
    constexpr int kCount = Bytes<kBytes>::kCount;
    uint32_t word[2 * kCount];
    for (int i = 0; i < kCount; ++i) word[i] = low.word[i], word[kCount + i] = high.word[i];
    if constexpr (kCount >= 4) {
      for (int i = 0; i < 2 * kCount - 2; ++i) word[i] = (shift & 8) != 0 ? word[i + 2] : word[i];
    }
    if constexpr (kCount >= 2 && kSize <= 4) {
      for (int i = 0; i < kCount + 1; ++i) word[i] = (shift & 4) != 0 ? word[i + 1] : word[i];
    }
    Bytes<kBytes> result;
    for (int i = 0; i < kCount; ++i) {
      result.word[i] = kSize >= 4 ? word[i] : static_cast<uint32_t>((uint64_t{word[i + 1]} << 32 | word[i]) >> 8 * (shift & 3));
    }
    return result;
  }
}

// Zeros outside bytes [begin, end).
FASTKD_DEVICE uint32_t lowest_bytes(int count) { return count <= 0 ? 0 : count >= 4 ? ~0u : (1u << 8 * count) - 1; }
template <int kBytes>
FASTKD_DEVICE void keep(Bytes<kBytes>& bytes, int begin, int end) {
  for (int i = 0; i < Bytes<kBytes>::kCount; ++i) {
    bytes.word[i] &= lowest_bytes(end - 4 * i) & ~lowest_bytes(begin - 4 * i);
  }
}

// Elements in reverse order.
template <int kSize, int kBytes>
FASTKD_DEVICE Bytes<kBytes> reversed(const Bytes<kBytes>& bytes) {
  constexpr int kCount = Bytes<kBytes>::kCount, kWords = kSize > 4 ? kSize / 4 : 1;  // of an element
  Bytes<kBytes> result;
  for (int i = 0; i < kCount; ++i) {
    const uint32_t word = bytes.word[(kCount / kWords - 1 - i / kWords) * kWords + i % kWords];
    const uint32_t left = word << 8 | word >> 24, right = word >> 8 | word << 24;
    result.word[i] = kSize >= 4    ? word
                     : kBytes == 2 ? (word >> 8 | word << 8) & 0xffffu
                     : kSize == 2  ? word >> 16 | word << 16
                                   : (left & 0x00ff00ffu) | (right & 0xff00ff00u);
  }
  return result;
}

// A run of kBytes bytes at any address, as the one or two aligned vectors that hold it: all loads, no use of them, so that
// several can be on their way.
template <int kBytes>
struct Run {
  Bytes<kBytes> low{}, high{};
};

// The bytes of a tensor, first to last. A vector that reaches beyond them may not be read.
struct Memory {
  const void* data;
  int64_t bytes;
};

// Whether aligned vectors that hold runs from byte `first` to byte `last` are all inside.
FASTKD_DEVICE bool holds(const Memory& memory, int64_t first, int64_t last, int bytes) {
  return first >= bytes - 1 && last <= memory.bytes - 2 * bytes;
}

// Bytes from the aligned vector to the run from byte `offset` on.
template <int kBytes>
FASTKD_DEVICE unsigned shift_of(const Memory& memory, int64_t offset) {
  return (static_cast<unsigned>(reinterpret_cast<uintptr_t>(memory.data)) + static_cast<unsigned>(offset)) % kBytes;
}
template <int kBytes>
FASTKD_DEVICE void load_run(const Memory& memory, int64_t offset, Run<kBytes>& run) {
  const unsigned shift = shift_of<kBytes>(memory, offset);
  const char* const data = static_cast<const char*>(memory.data) + (offset - shift);
  run.low = load_bytes<kBytes>(data);
  if (shift != 0) run.high = load_bytes<kBytes>(data + kBytes);
}

// Elements [begin, end) of a vector. Those that hold the end of a row are stored in pieces, which keeps none of them waiting
// in registers for the next row.
template <typename T>
FASTKD_DEVICE void store(T* out, int begin, int end, const Pack<T>& pack) {
  if (begin == 0 && end == kPack<T>) return store_pack_once(out, pack);
  for (int i = 0; i < kPack<T>; ++i) {
    if (i >= begin && i < end) out[i] = pack.value[i];
  }
}

FASTKD_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
FASTKD_DEVICE int larger(int a, int b) { return a > b ? a : b; }
FASTKD_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// The largest number of parts, up to `most`, into which `count` things split evenly, each part whole vectors.
inline int64_t even_parts(int64_t most, int64_t count, int64_t elements_each, int64_t vector) {
  for (int64_t parts = most; parts > 1; --parts) {
    if (count % parts == 0 && count / parts * elements_each % vector == 0) return parts;
  }
  return 1;
}

}  // namespace
}  // namespace fastkd::crop
