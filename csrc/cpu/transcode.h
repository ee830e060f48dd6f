// The CPU kernel's plain-pointer interface: torch gives it bfloat16 and nothing else.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

namespace deltatc {

// A step of a packed W_enc is a row of it; of bfloat16 two rows, side by side in 32 bits.
template <typename T>
constexpr int64_t kPerStep = std::is_same_v<T, c10::BFloat16> ? 2 : 1;
template <typename T>
using Packed = std::conditional_t<kPerStep<T> == 2, uint32_t, T>;

// One transcoder's weights, contiguous. `k` latents are kept of each token's active ones (width: all of them).
template <typename T>
struct Part {
  const Packed<T>* packed = nullptr;  // W_enc as [strip of latents][step][latent]
  const T* b_enc = nullptr;      // [width]
  const T* threshold = nullptr;  // [width]
  const T* W_dec = nullptr;      // [width, d_model]
  const T* b_dec = nullptr;      // [d_model]
  int64_t width = 0;
  int64_t k = 0;
  float* l0 = nullptr;  // [tokens], or null where nobody asks
  float* l1 = nullptr;
};

template <typename T>
struct Transcode {
  int64_t tokens = 0;
  int64_t d_model = 0;
  const T* x = nullptr;  // [tokens, d_model]
  T* recon = nullptr;    // [tokens, d_model]
  Part<T> base;
  Part<T> delta;
  bool has_delta = false;
  double alpha = 1.0;
};

}  // namespace deltatc
