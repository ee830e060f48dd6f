// The CPU kernel's plain-pointer interface: no torch types, so that it can be read, built and tested alone.
#pragma once

#include <cstdint>

namespace deltatc {

// One transcoder's weights, contiguous. `k` latents are kept of each token's active ones (width: all of them).
template <typename T>
struct Part {
  const T* W_enc = nullptr;      // [d_model, width]
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
