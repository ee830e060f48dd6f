// One token's recon: the sum of the rows of W_dec that its acts choose, in double where groups of acts come together.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels.h"

namespace deltatc {

template <typename T>
class Decoder {
 public:
  using Acc = Accumulator<T>;
  Decoder(const Kernels<T>& kernel, int64_t d_model)
      : kernel_(kernel), d_model_(d_model), total_(d_model), sums_(d_model) {}

  void clear() { std::fill_n(total_.get(), d_model_, 0.0); }

  // total += scale * (acts @ W_dec + b_dec); a scale of 0 adds nothing, whatever the weights are.
  void add(const std::vector<Act<Acc>>& acts, const T* W_dec, const T* b_dec, double scale) {
    if (scale == 0.0) return;
    for (int64_t i = 0; i < d_model_; ++i) total_[i] += scale * static_cast<double>(static_cast<Acc>(b_dec[i]));
    kernel_.decode(acts.data(), static_cast<int64_t>(acts.size()), W_dec, d_model_, scale, sums_.get(), total_.get());
  }

  void write(T* recon, bool broken) const {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (int64_t i = 0; i < d_model_; ++i) recon[i] = static_cast<T>(static_cast<Acc>(broken ? nan : total_[i]));
  }

 private:
  Kernels<T> kernel_;
  int64_t d_model_;
  Scratch<double> total_;
  Scratch<Acc> sums_;
};

}  // namespace deltatc
