// What the bindings of the CUDA kernels share: checks, memory and the stream. The tests compile them with
// DELTATC_HOST_SHIM and CPU tensors instead: then all but `current_stream` and the key is the same.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "kernels.h"

#ifdef DELTATC_HOST_SHIM
#define DTC_LIBRARY deltatc_shim
#define DTC_KEY CPU
#else
#include <dlfcn.h>
#define DTC_LIBRARY deltatc
#define DTC_KEY CUDA
#endif

namespace deltatc {
namespace {  // torch's stable types are hidden, and so must be what holds them

using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;
using MaybeInt = std::optional<int64_t>;

#ifdef DELTATC_HOST_SHIM
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
#else
struct OnDevice {
  explicit OnDevice(const Tensor& x) : guard(x.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

// Every CUDA build of torch exports this function, a CPU build does not: so it is looked for when it is needed.
inline cudaStream_t current_stream(const Tensor& x) {
  using Find = int32_t (*)(int32_t, void**);
  static const Find find = reinterpret_cast<Find>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(find != nullptr, "this torch has no CUDA; expected a CUDA build of torch for a tensor on a CUDA device");
  void* stream = nullptr;
  STD_TORCH_CHECK(find(x.get_device_index(), &stream) == 0, "the current CUDA stream cannot be had");
  return static_cast<cudaStream_t>(stream);
}
#endif

inline void check_launch(int error, const char* name) {
  STD_TORCH_CHECK(error == 0, name, " failed with CUDA error ", error, "; expected 0 (look it up as cudaError_t)");
}

// Tensors that kernels read: checked, contiguous, and held until the kernels are launched (torch's allocator keeps
// their memory in order).
class Held {
 public:
  const bf16* values(const Tensor& tensor) { return static_cast<const bf16*>(hold(torch::stable::contiguous(tensor))); }

  const bf16* operator()(const std::string& name, const Tensor& tensor, const Tensor& x,
                         std::initializer_list<int64_t> shape) {
    check_like(name.c_str(), tensor, x, shape);
    return values(tensor);
  }

  const int32_t* integers(const std::string& name, const Tensor& tensor, const Tensor& x,
                          torch::headeronly::IntHeaderOnlyArrayRef shape) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.sizes() == shape && tensor.is_cpu() == x.is_cpu(),
                    name, " has shape ", shape_text(tensor), "; expected int32 in the shape of values, ", shape_text(x),
                    ", and on its device");
    return static_cast<const int32_t*>(hold(torch::stable::contiguous(tensor)));
  }

  const float* scalar(const char* name, const Tensor& tensor, const Tensor& x) {
    STD_TORCH_CHECK(tensor.dim() == 0 && tensor.is_cpu() == x.is_cpu(), name, " has shape ", shape_text(tensor),
                    "; expected a scalar [] on one device with the rest");
    return static_cast<const float*>(hold(torch::stable::to(tensor, ScalarType::Float)));
  }

 private:
  const void* hold(Tensor tensor) { return tensors_.emplace_back(std::move(tensor)).data_ptr(); }

  std::vector<Tensor> tensors_;
};

inline void check_model(const char* name, const Tensor& tensor) {
  const int64_t d_model = tensor.dim() < 1 ? 0 : tensor.size(tensor.dim() - 1);
  const bool fits = d_model >= 8 && d_model % 8 == 0 && d_model <= kMaxModel;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16 && fits, name, " has shape ", shape_text(tensor),
                  "; expected bfloat16 [..., d_model], d_model a multiple of 8 up to ", kMaxModel);
}

inline int32_t check_width(const std::string& name, int64_t width) {
  STD_TORCH_CHECK(width < int64_t{1} << 31, name, " has ", width, " latents; expected less than 2^31");
  return static_cast<int32_t>(width);
}

inline int32_t check_limit(const char* name, const MaybeInt& k, int32_t width) {
  check_k(name, k, width);
  if (!k || *k == width) return 0;
  STD_TORCH_CHECK(*k <= kMaxKeys, name, " = ", *k, "; expected at most ", kMaxKeys, " on a CUDA device");
  return static_cast<int32_t>(*k);
}

// A part without its decoder.
inline CudaPart encoder_of(const std::string& prefix, const Tensor& x, const Tensor& rows, const Tensor& b_enc,
                           const Tensor& threshold, Held& held) {
  CudaPart part{};
  part.width = check_width(prefix + "b_enc", b_enc.numel());
  part.W_enc = held(prefix + "rows", rows, x, {part.width, x.size(x.dim() - 1)});
  part.b_enc = held(prefix + "b_enc", b_enc, x, {part.width});
  part.threshold = held(prefix + "threshold", threshold, x, {part.width});
  return part;
}

inline std::vector<int64_t> leading_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end() - 1}; }

}  // namespace
}  // namespace deltatc
