// Crops at given places: the kernels of forward.cuh, and the choice among them.
#pragma once

#include <utility>

#include "common/tuning.h"
#include "crop/forward.cuh"

namespace fastkd::crop {
namespace {

struct GivenPlaces {
  static constexpr bool kInMemory = true;

  class Origin {
   public:
    Origin() = default;
    FASTKD_DEVICE Origin(const Geometry& g, int64_t patch)
        : y_(g.offsets[2 * patch]), x_(g.offsets[2 * patch + 1]), flip_(g.flip != nullptr && g.flip[patch]) {}

    FASTKD_DEVICE static int64_t image(int64_t of) { return of; }
    FASTKD_DEVICE int64_t y() const { return y_; }
    FASTKD_DEVICE int64_t x() const { return x_; }
    FASTKD_DEVICE bool flip() const { return flip_; }
    FASTKD_DEVICE static constexpr bool is_missing() { return false; }

   private:
    int64_t y_, x_;
    bool flip_;
  };
  const Geometry& geometry;  // where launch parameters are: no registers for its pointers

  FASTKD_DEVICE Origin origin(int64_t /*image*/, int64_t patch) const { return {geometry, patch}; }
};

// inspect: streaming crop_kernel<unsignedchar,*> loads=16 stores=128
// inspect: streaming crop_kernel<unsignedchar,unsignedchar> loads=128 stores=128
// inspect: streaming crop_kernel<unsignedshort,*> loads=128 stores=128
// inspect: streaming crop_kernel<unsignedint,*> loads=128 stores=128
// inspect: streaming crop_kernel<unsignedlong,*> loads=128 stores=128
// inspect: streaming crop_kernel<[BFd]*> loads=128 stores=128
// inspect: streaming crop_kernel<float,*> loads=128 stores=128
template <typename In, typename Out>
FASTKD_KERNEL(kThreads, kForwardBlocks<In, Out>)
crop_kernel(const ForwardParams p) {
  const ConstantsOnDevice constants(p.constants);
  crop_block<In, Out>(p, block_of(p, block_index(), kPack<Out>), GivenPlaces{p.call.geometry}, constants);
}

using ForwardKernel = void (*)(ForwardParams);

// The kernel, and elements of its vectors.
template <typename In, typename Out>
std::pair<ForwardKernel, int> forward() {
  return {crop_kernel<In, Out>, kPack<Out>};
}
inline std::pair<ForwardKernel, int> forward_of(const CropParams& call) {
  if (!call.convert) {
    switch (call.out_size) {
      case 1: return forward<uint8_t, uint8_t>();
      case 2: return forward<uint16_t, uint16_t>();
      case 4: return forward<uint32_t, uint32_t>();
      default: return forward<uint64_t, uint64_t>();
    }
  }
  const bool byte = call.in_dtype == Dtype::kUInt8;
  return for_dtype(call.out_dtype, [&]<typename Out>() { return byte ? forward<uint8_t, Out>() : forward<Out, Out>(); });
}

struct ForwardPlan {
  ForwardParams params;
  ForwardKernel kernel;
  ::fastkd::Geometry launch;
};

// Of a call with at least one element.
inline ForwardPlan plan_forward(const CropParams& call, int64_t images, const Constants& constants, unsigned multiprocessors,
                                int64_t narrow = kNarrow) {
  const auto [kernel, vector] = forward_of(call);
  const ForwardLayout layout = lay_out_forward(call, images, images, constants, vector,
                                               {multiprocessors, narrow, static_cast<unsigned>(tuned(Knob::kCropRounds))});
  return {layout.params, kernel, layout.launch};
}

}  // namespace
}  // namespace fastkd::crop
