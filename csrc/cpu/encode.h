// From tokens to each token's active latents, by all threads: what transcode and the sparse operators share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../checks.h"
#include "kernels.h"

namespace deltatc {

using MaybeTensor = std::optional<Tensor>;
using MaybeInt = std::optional<int64_t>;

// The encoder of a part as tensors, contiguous, held while its pointers are read. `rows` and `screen` are pack()'s.
struct __attribute__((visibility("hidden"))) EncoderTensors {
  EncoderTensors(const std::string& prefix, const Tensor& x, const Tensor& rows, const MaybeTensor& screen,
                 const Tensor& b_enc, const Tensor& threshold);

  template <typename T>
  Part<T> part(const MaybeInt& k) const {
    Part<T> part;
    part.rows = static_cast<const T*>(tensors[0].data_ptr());
    part.b_enc = static_cast<const T*>(tensors[1].data_ptr());
    part.threshold = static_cast<const T*>(tensors[2].data_ptr());
    if (tensors.size() > 3) part.screen = static_cast<const uint8_t*>(tensors[3].data_ptr());
    part.width = width;
    part.k = k.value_or(width);
    return part;
  }

  std::vector<Tensor> tensors;
  int64_t width = 0;
};

// The active latents of a block of tokens in each part. Each thread has its own range of all parts' latents.
template <typename T>
class Encoded {
 public:
  using Acc = Accumulator<T>;
  Encoded(const Kernels<T>& kernel, std::vector<const Part<T>*> parts, int64_t tokens, int64_t d_model);

  int64_t rows() const { return tokens_.rows; }
  void encode(const T* x, int64_t rows);
  // One row's acts of a part, in the order of their latents; returns whether x or a pre_act is not finite.
  bool collect(size_t part, int64_t row, std::vector<Act<Acc>>& acts) const;

 private:
  size_t slot(size_t part, int64_t range) const { return (part * ranges_ + range) * block_; }
  void encode_range(int64_t range);

  Kernels<T> kernel_;
  std::vector<const Part<T>*> parts_;
  int64_t ranges_, block_;
  Tokens<T> tokens_;
  std::vector<List<Acc>> lists_;  // [part][range][row]
  Scratch<bool> broken_;          // the same
};

}  // namespace deltatc
