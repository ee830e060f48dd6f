// Checks that keep a direct call of torch.ops.deltatc from reading outside a tensor. The Python wrapper has already
// said the same in better words.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace deltatc {

using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(tensor.size(axis));
  }
  return text + "]";
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& x, std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string wanted;
  int64_t axis = 0;
  for (int64_t size : shape) {
    fits = fits && tensor.size(axis) == size;
    wanted += (axis++ ? ", " : "") + std::to_string(size);
  }
  STD_TORCH_CHECK(fits, name, " has shape ", shape_text(tensor), "; expected [", wanted, "]");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " and x are of different dtypes");
  STD_TORCH_CHECK(tensor.is_cpu() == x.is_cpu(), name, " and x are on different devices");
}

inline void check_k(const char* name, const std::optional<int64_t>& k, int64_t width) {
  STD_TORCH_CHECK(!k || (*k >= 1 && *k <= width), name, " = ", k.value_or(0), "; expected 1 to ", width, " or None");
}

}  // namespace deltatc
