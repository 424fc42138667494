// IEEE arithmetic for as long as this lives, whatever mode the thread is in. torch.set_flush_denormal changes the mode of the
// calling thread alone: with it, results would depend on which thread computes them.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastkd {

class IeeeMode {
#if defined(__x86_64__)
 public:
  IeeeMode() : before_(_mm_getcsr()) {
    if ((before_ & kFlush) != 0) _mm_setcsr(before_ & ~kFlush);
  }
  ~IeeeMode() {
    if ((before_ & kFlush) != 0) _mm_setcsr(before_);
  }
  IeeeMode(const IeeeMode&) = delete;
  IeeeMode& operator=(const IeeeMode&) = delete;

 private:
  static constexpr unsigned kFlush = 0x8040;  // flush to zero, denormals are zero
  const unsigned before_;
#elif defined(__aarch64__)
 public:
  IeeeMode() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    if ((before_ & kFlush) != 0) asm volatile("msr fpcr, %0" ::"r"(before_ & ~kFlush));
  }
  ~IeeeMode() {
    if ((before_ & kFlush) != 0) asm volatile("msr fpcr, %0" ::"r"(before_));
  }
  IeeeMode(const IeeeMode&) = delete;
  IeeeMode& operator=(const IeeeMode&) = delete;

 private:
  static constexpr uint64_t kFlush = uint64_t{1} << 24;
  uint64_t before_;
#endif
};

}  // namespace fastkd
