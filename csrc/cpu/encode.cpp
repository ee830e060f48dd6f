// Packing of W_enc, and encoding of a block of tokens: threads share the latents, so that each weight is read once.
#include "encode.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>

namespace deltatc {

template <typename T>
Strip<T>::Strip(const Part<T>& part, int64_t strip, int64_t d_model)
    : first(strip * kStrip),
      count(std::min(kStrip, part.width - first)),
      rows(part.rows + first * padded<T>(d_model)),
      screen(part.screen == nullptr ? nullptr : part.screen + strip * screen_bytes(d_model)) {
  using Acc = Accumulator<T>;
  for (int64_t j = 0; j < kStrip; ++j) {
    const Acc raw = j < count ? static_cast<Acc>(part.threshold[first + j]) : Acc(0);
    bias[j] = j < count ? static_cast<Acc>(part.b_enc[first + j]) : Acc(0);
    threshold[j] = raw < 0 ? Acc(0) : raw;
  }
}

namespace {

// Keeps the k largest (ties: lower index), in order of index. Later latents have higher indices, so a tie with the
// k-th loses: only what is above it can still enter.
template <typename Acc>
void keep_largest(Act<Acc>* acts, int64_t& size, int64_t k, Acc& floor) {
  if (size < k) return;
  std::nth_element(acts, acts + (k - 1), acts + size, [](const Act<Acc>& a, const Act<Acc>& b) {
    return a.value != b.value ? a.value > b.value : a.index < b.index;
  });
  floor = acts[k - 1].value;
  size = k;
  std::sort(acts, acts + k, [](const Act<Acc>& a, const Act<Acc>& b) { return a.index < b.index; });
}

// Room for a whole strip: with a limit by cutting the list to it, else by making it longer.
template <typename T>
void make_room(const Part<T>& part, List<Accumulator<T>>& list) {
  const int64_t capacity = static_cast<int64_t>(list.acts.size());
  if (list.size + kStrip <= capacity) return;
  const bool limited = part.k < part.width;
  const int64_t room = (limited ? part.k + std::max<int64_t>(part.k, 64) : 2 * list.size + 128) + kStrip;
  if (limited && capacity > 0) keep_largest(list.acts.data(), list.size, part.k, list.floor);
  if (room > capacity) list.acts.resize(room);
}

}  // namespace

template <typename T>
Encoded<T>::Encoded(const Kernels<T>& kernel, std::vector<const Part<T>*> parts, int64_t tokens, int64_t d_model)
    : kernel_(kernel),
      parts_(std::move(parts)),
      ranges_(torch::stable::get_num_threads()),
      block_(std::min(tokens, kBlock)),
      tokens_(block_, d_model),
      lists_(parts_.size() * ranges_ * block_),
      broken_(lists_.size()) {}

template <typename T>
void Encoded<T>::encode(const T* x, int64_t rows) {
  tokens_.rows = rows;
  torch::stable::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) { kernel_.pack_tokens(x, begin, end, tokens_); });
  for (List<Acc>& list : lists_) list.size = 0, list.floor = Acc(0);
  std::fill_n(broken_.get(), lists_.size(), false);
  torch::stable::parallel_for(0, ranges_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t range = begin; range < end; ++range) encode_range(range);
  });
}

template <typename T>
void Encoded<T>::encode_range(int64_t range) {
  Workspace<T> work(tokens_.rows);
  int64_t total = 0;
  for (const Part<T>* part : parts_) total += strips(part->width);
  const int64_t first = total * range / ranges_, last = total * (range + 1) / ranges_;
  int64_t before = 0;  // strips of earlier parts
  for (size_t p = 0; p < parts_.size(); before += strips(parts_[p]->width), ++p) {
    const int64_t n_strips = strips(parts_[p]->width);
    for (int64_t i = std::max<int64_t>(first - before, 0); i < std::min(last - before, n_strips); ++i) {
      List<Acc>* lists = &lists_[slot(p, range)];
      for (int64_t row = 0; row < tokens_.rows; ++row) make_room(*parts_[p], lists[row]);
      kernel_.encode_strip(Strip<T>(*parts_[p], i, tokens_.d_model), tokens_, lists, &broken_[slot(p, range)], work);
    }
  }
}

template <typename T>
bool Encoded<T>::collect(size_t part, int64_t row, std::vector<Act<Acc>>& acts) const {
  bool broken = tokens_.broken[row];
  acts.clear();
  for (int64_t range = 0; range < ranges_; ++range) {
    const List<Acc>& list = lists_[slot(part, range) + row];
    acts.insert(acts.end(), list.acts.begin(), list.acts.begin() + list.size);
    broken |= broken_[slot(part, range) + row];
  }
  if (parts_[part]->k < parts_[part]->width) {
    int64_t size = static_cast<int64_t>(acts.size());
    Acc floor;
    keep_largest(acts.data(), size, parts_[part]->k, floor);
    acts.resize(size);
  }
  return broken;
}

template class Encoded<double>;
template class Encoded<float>;
template class Encoded<c10::BFloat16>;

EncoderTensors::EncoderTensors(const std::string& prefix, const Tensor& x, const Tensor& rows,
                               const MaybeTensor& screen, const Tensor& b_enc, const Tensor& threshold)
    : width(b_enc.numel()) {
  using torch::headeronly::ScalarType;
  const int64_t d_model = x.size(x.dim() - 1), of_line = 64 / x.element_size();
  check_like((prefix + "rows").c_str(), rows, x, {width, round_up(d_model, of_line)});
  check_like((prefix + "b_enc").c_str(), b_enc, x, {width});
  check_like((prefix + "threshold").c_str(), threshold, x, {width});
  STD_TORCH_CHECK(rows.is_contiguous(), prefix, "rows is not contiguous; expected what pack(W_enc) returns");
  for (const Tensor* tensor : {&rows, &b_enc, &threshold}) tensors.push_back(torch::stable::contiguous(*tensor));
  if (!screen || screen->numel() == 0) return;
  STD_TORCH_CHECK(screen->scalar_type() == ScalarType::Byte && screen->is_cpu() && screen->is_contiguous() &&
                      screen->dim() == 2 && screen->size(0) == strips(width) &&
                      screen->size(1) == screen_bytes(d_model),
                  prefix, "screen has shape ", shape_text(*screen), "; expected what pack(W_enc) returns");
  tensors.push_back(*screen);
}

namespace {

template <typename T>
void transpose(const T* W_enc, int64_t d_model, int64_t width, int64_t first, int64_t count, T* rows) {
  const int64_t size = padded<T>(d_model);
  for (int64_t j = 0; j < count; ++j) std::fill_n(rows + j * size + d_model, size - d_model, T(0));
  for (int64_t i = 0; i < d_model; ++i) {
    for (int64_t j = 0; j < count; ++j) rows[j * size + i] = W_enc[i * width + first + j];
  }
}

// W_enc [d_model, width] -> its latents as rows, and their screen: empty where this CPU or dtype has no use for one.
std::tuple<Tensor, Tensor> pack(Tensor W_enc) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(W_enc.dim() == 2 && W_enc.is_cpu(), "W_enc has shape ", shape_text(W_enc),
                  "; expected [d_model, d_sae] on the CPU");
  const int64_t d_model = W_enc.size(0), width = W_enc.size(1);
  STD_TORCH_CHECK(width <= std::numeric_limits<int32_t>::max(), "W_enc has ", width, " latents; expected less than 2^31");
  const Tensor columns = torch::stable::contiguous(W_enc);
  const auto packed_as = [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T> kernel = kernels<T>();
    const bool screened = kernel.screens && d_model <= kMaxScreened;
    const Tensor rows = torch::stable::empty({width, padded<T>(d_model)}, W_enc.scalar_type());
    const Tensor screen =
        torch::stable::empty({screened ? strips(width) : 0, screen_bytes(d_model)}, ScalarType::Byte);
    T* to = static_cast<T*>(rows.data_ptr());
    uint8_t* to_screen = static_cast<uint8_t*>(screen.data_ptr());
    torch::stable::parallel_for(0, strips(width), 1, [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = strip * kStrip, count = std::min(kStrip, width - first);
        T* of_strip = to + first * padded<T>(d_model);
        transpose(static_cast<const T*>(columns.data_ptr()), d_model, width, first, count, of_strip);
        if (screened) kernel.screen_latents(of_strip, count, d_model, to_screen + strip * screen_bytes(d_model));
      }
    });
    return std::make_tuple(rows, screen);
  };
  switch (W_enc.scalar_type()) {
    case ScalarType::Double: return packed_as(double());
    case ScalarType::Float: return packed_as(float());
    case ScalarType::BFloat16: return packed_as(c10::BFloat16());
    default: STD_TORCH_CHECK(false, "W_enc has a dtype without a CPU kernel; expected float64, float32 or bfloat16");
  }
}

}  // namespace
}  // namespace deltatc

STABLE_TORCH_LIBRARY_IMPL(deltatc, CPU, m) { m.impl("pack", TORCH_BOX(&deltatc::pack)); }
