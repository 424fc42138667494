// Pages of large fresh buffers.
//
// What malloc hands out anew, be it mapped for one tensor or the top of the heap that an earlier free gave back, costs a
// page fault for every 4 KiB written: 1.2 us each where we measured, several times what the write takes. Whether a buffer is
// such a one depends on what the process freed before. Huge pages and pages made in one go are several times cheaper.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastkd {

constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr size_t kFreshBytes = size_t{128} << 10;  // smaller buffers are seldom fresh: malloc reuses its heap

// The part of a buffer that holds whole pages.
struct Pages {
  char* data;
  size_t bytes;
};
inline Pages whole_pages(void* data, size_t bytes, size_t page) {
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  return {reinterpret_cast<char*>(first), first < last ? last - first : 0};
}

// All of these are hints: no effect is no error.

// Asks for huge pages in the part of a buffer that holds whole ones.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const Pages huge = whole_pages(data, bytes, kHugePageBytes);
  if (huge.bytes > 0) madvise(huge.data, huge.bytes, MADV_HUGEPAGE);
#endif
}

// Whether a page of the buffer would fault. A look at all of them takes a tenth of what making present ones again does.
inline bool is_fresh([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr size_t kLook = 512;  // pages in one look
  const size_t page = static_cast<size_t>(getpagesize());
  const Pages pages = whole_pages(data, bytes, page);
  unsigned char present[kLook];
  for (size_t at = 0; at < pages.bytes; at += kLook * page) {
    const size_t look = pages.bytes - at < kLook * page ? pages.bytes - at : kLook * page;
    if (mincore(pages.data + at, look, present) != 0) return false;
    for (size_t i = 0; i < look / page; ++i) {
      if ((present[i] & 1) == 0) return true;
    }
  }
#endif
  return false;
}

// Makes all pages present and writable in one system call; what they hold stays.
inline void populate([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE of Linux 5.14, which older headers lack
  const Pages pages = whole_pages(data, bytes, static_cast<size_t>(getpagesize()));
  if (pages.bytes > 0) madvise(pages.data, pages.bytes, kPopulateWrite);
#endif
}

}  // namespace fastkd
