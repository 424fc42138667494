// What the launchers need of torch: checks of tensors, fresh outputs, threads, per-thread scratch.
// Stable-ABI headers only; never included by a cpu_kernel.cpp (see isa.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"
#include "common/float_mode.h"
#include "common/pages.h"

namespace fastkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- descriptions for messages -----------------------------------------------------------------

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d > 0 ? ", " : "") << t.size(d);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// ---- checks ------------------------------------------------------------------------------------

inline void check_dtype(const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed) {
  for (ScalarType type : allowed) {
    if (t.scalar_type() == type) return;
  }
  std::ostringstream list;
  for (ScalarType type : allowed) list << (list.tellp() > 0 ? ", " : "") << dtype_name(type);
  fail(name, " has dtype ", dtype_name(t.scalar_type()), ", must be one of ", list.str());
}

inline void check_dim(const char* name, const Tensor& t, int64_t dim) {
  FASTKD_CHECK(t.dim() == dim, name, " has shape ", shape_of(t), ", must have ", dim, " dimensions");
}

inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) same = same && t.size(d++) == size;
  if (same) return;
  std::ostringstream wanted;
  for (int64_t size : shape) wanted << (wanted.tellp() > 0 ? ", " : "") << size;
  fail(name, " has shape ", shape_of(t), ", must be (", wanted.str(), shape.size() == 1 ? ",)" : ")");
}

inline void check_device(const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  FASTKD_CHECK(t.device() == like.device(), name, " is on another device than ", like_name, "; move one of them");
}

constexpr std::initializer_list<ScalarType> kFloats = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                                       ScalarType::Half};

inline Dtype kernel_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::Byte: return Dtype::kUInt8;
    default: fail("dtype ", dtype_name(t.scalar_type()), " has no kernel");
  }
}

// ---- outputs -----------------------------------------------------------------------------------

// A fresh uninitialised tensor; packed where no strides are given.
inline Tensor empty_on(int32_t device_type, int32_t device, std::initializer_list<int64_t> shape, ScalarType type,
                       std::initializer_list<int64_t> strides = {}) {
  int64_t packed[8];
  int64_t numel = 1;
  for (int64_t d = static_cast<int64_t>(shape.size()) - 1; d >= 0; --d) {
    packed[d] = numel;
    numel *= shape.begin()[d];
  }
  AtenTensorHandle handle;
  const auto error = aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.begin(), strides.size() > 0 ? strides.begin() : packed,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type, device, &handle);
  if (error != AOTI_TORCH_SUCCESS) [[unlikely]] {
    std::ostringstream wanted;
    for (int64_t size : shape) wanted << (wanted.tellp() > 0 ? ", " : "") << size;
    fail("a new tensor has shape (", wanted.str(), shape.size() == 1 ? ",)" : ")", " and dtype ", dtype_name(type),
         ", must be one that the ", device_type == aoti_torch_device_type_cpu() ? "CPU" : "GPU", " has the memory for");
  }
  return Tensor(handle);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// ---- threads -----------------------------------------------------------------------------------

// body(begin, end) over [0, count) in ranges of at least `grain`; one range runs in the caller.
template <typename Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain) {
    if (count > 0) body(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      const IeeeMode mode;  // of this thread
      body(begin, end);
    });
  }
}

// ---- CPU kernels ---------------------------------------------------------------------------------

// `function` as an operator of the CPU.
template <auto kFunction>
struct CpuOperator;
template <typename Result, typename... Arguments, Result (*kFunction)(Arguments...)>
struct CpuOperator<kFunction> {
  static Result call(Arguments... arguments) {
    const IeeeMode mode;
    return kFunction(std::move(arguments)...);
  }
};
#define FASTKD_CPU_BOX(function) TORCH_BOX(&::fastkd::CpuOperator<&function>::call)

// ---- outputs on the CPU ------------------------------------------------------------------------

// empty_on the CPU, for a result that is written at once: its pages are made present by all threads before that.
inline Tensor empty_cpu(std::initializer_list<int64_t> shape, ScalarType type, std::initializer_list<int64_t> strides = {}) {
  Tensor result = empty_on(aoti_torch_device_type_cpu(), 0, shape, type, strides);
  const size_t bytes = static_cast<size_t>(result.numel()) * result.element_size();
  if (bytes < kFreshBytes) return result;
  char* const data = static_cast<char*>(result.mutable_data_ptr());
  if (bytes >= kHugePageBytes) advise_huge_pages(data, bytes);
  if (is_fresh(data, bytes)) {
    constexpr int64_t kGrain = 4 << 20;  // bytes worth a thread: two threads make 4 KiB pages hardly faster than one
    parallel(static_cast<int64_t>(bytes), kGrain, [&](int64_t begin, int64_t end) { populate(data + begin, end - begin); });
  }
  return result;
}

// ---- scratch -----------------------------------------------------------------------------------

// Memory of this thread for `count` elements of T, 64-byte aligned, kept from call to call.
template <typename T>
T* scratch(size_t count) {
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  const size_t wanted = (count * sizeof(T) + 63) / 64 * 64;
  if (wanted > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    buffer.data = std::aligned_alloc(64, wanted);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = wanted;
  }
  return static_cast<T*>(buffer.data);
}

}  // namespace fastkd
