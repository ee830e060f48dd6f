// torch.ops.deltatc.encode_packed and decode on the CPU: the halves of transcode, with acts as tensors in between.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "decode.h"
#include "encode.h"

namespace deltatc {
namespace {

using Sparse = std::tuple<Tensor, Tensor, Tensor>;

// All tokens' acts, a block at a time; then values, indices [tokens, capacity] and counts [tokens]. A row that is not
// finite has one act, NaN at latent 0, so that decoding it gives NaN.
template <typename T>
Sparse encode_as(const Tensor& x, const Part<T>& part, MaybeInt capacity) {
  using torch::headeronly::ScalarType;
  using Acc = Accumulator<T>;
  const int64_t d_model = x.size(x.dim() - 1);
  const std::vector<int64_t> leading(x.sizes().begin(), x.sizes().end() - 1);
  int64_t n_tokens = 1;
  for (int64_t size : leading) n_tokens *= size;
  std::vector<std::vector<Act<Acc>>> rows_acts(n_tokens);
  Encoded<T> found(kernels<T>(), {&part}, n_tokens, d_model);
  for (int64_t first = 0; first < n_tokens; first += kBlock) {
    found.encode(static_cast<const T*>(x.data_ptr()) + first * d_model, std::min(kBlock, n_tokens - first));
    torch::stable::parallel_for(0, found.rows(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::vector<Act<Acc>>& acts = rows_acts[first + row];
        if (found.collect(0, row, acts)) acts = {{std::numeric_limits<Acc>::quiet_NaN(), 0}};
      }
    });
  }
  int64_t largest = 0;
  for (const auto& acts : rows_acts) largest = std::max(largest, static_cast<int64_t>(acts.size()));
  STD_TORCH_CHECK(!capacity || largest <= *capacity, "a token has ", largest, " active latents, over capacity = ",
                  capacity.value_or(0), "; raise capacity, or give None for no limit");
  std::vector<int64_t> shape = leading;
  shape.push_back(capacity.value_or(largest));
  Tensor values = torch::stable::empty(shape, x.scalar_type());
  Tensor indices = torch::stable::empty(shape, ScalarType::Int);
  const Tensor counts = torch::stable::empty(leading, ScalarType::Int);
  torch::stable::zero_(values);
  torch::stable::zero_(indices);
  for (int64_t row = 0; row < n_tokens; ++row) {
    static_cast<int32_t*>(counts.data_ptr())[row] = static_cast<int32_t>(rows_acts[row].size());
    T* value = static_cast<T*>(values.data_ptr()) + row * shape.back();
    int32_t* index = static_cast<int32_t*>(indices.data_ptr()) + row * shape.back();
    for (const auto& act : rows_acts[row]) *value++ = static_cast<T>(act.value), *index++ = act.index;
  }
  return {values, indices, counts};
}

Sparse encode_packed(Tensor x, Tensor rows, MaybeTensor screen, Tensor b_enc, Tensor threshold, MaybeInt k,
                     MaybeInt capacity) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_cpu(), "x has shape ", shape_text(x), "; expected [..., d_model] on the CPU");
  const EncoderTensors encoder("", x, rows, screen, b_enc, threshold);
  check_k("k", k, encoder.width);
  STD_TORCH_CHECK(!capacity || *capacity >= 1, "capacity = ", capacity.value_or(0), "; expected 1 or more, or None");
  const Tensor tokens = torch::stable::contiguous(x);
  switch (x.scalar_type()) {
    case ScalarType::Double: return encode_as<double>(tokens, encoder.part<double>(k), capacity);
    case ScalarType::Float: return encode_as<float>(tokens, encoder.part<float>(k), capacity);
    case ScalarType::BFloat16: return encode_as<c10::BFloat16>(tokens, encoder.part<c10::BFloat16>(k), capacity);
    default: STD_TORCH_CHECK(false, "x has a dtype without a CPU kernel; expected float64, float32 or bfloat16");
  }
}

// One part's acts as decode reads them, contiguous: values, indices, counts, W_dec, b_dec.
struct SparsePart {
  SparsePart(const std::string& prefix, const Tensor& values, const Tensor& indices, const Tensor& counts,
             const Tensor& W_dec, const Tensor& b_dec) {
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(values.dim() >= 1 && values.is_cpu(), prefix, "values has shape ", shape_text(values),
                    "; expected [..., capacity] on the CPU");
    STD_TORCH_CHECK(W_dec.dim() == 2, prefix, "W_dec has shape ", shape_text(W_dec), "; expected [d_sae, d_model]");
    capacity = values.size(values.dim() - 1);
    n_tokens = 1;
    for (int64_t axis = 0; axis + 1 < values.dim(); ++axis) n_tokens *= values.size(axis);
    width = W_dec.size(0);
    d_model = W_dec.size(1);
    check_like((prefix + "W_dec").c_str(), W_dec, values, {width, d_model});
    check_like((prefix + "b_dec").c_str(), b_dec, values, {d_model});
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int && counts.scalar_type() == ScalarType::Int &&
                        indices.is_cpu() && counts.is_cpu() && indices.numel() == n_tokens * capacity &&
                        counts.numel() == n_tokens,
                    prefix, "indices has shape ", shape_text(indices), " and counts ", shape_text(counts),
                    "; expected int32 [..., capacity] and [...] beside values ", shape_text(values));
    for (const Tensor* tensor : {&values, &indices, &counts, &W_dec, &b_dec}) {
      tensors.push_back(torch::stable::contiguous(*tensor));
    }
    const int32_t* count = static_cast<const int32_t*>(tensors[2].data_ptr());
    const int32_t* index = static_cast<const int32_t*>(tensors[1].data_ptr());
    for (int64_t row = 0; row < n_tokens; ++row) {
      STD_TORCH_CHECK(count[row] >= 0 && count[row] <= capacity, prefix, "counts holds ", count[row],
                      "; expected 0 to the capacity ", capacity);
      for (int64_t i = 0; i < count[row]; ++i) {
        const int32_t latent = index[row * capacity + i];
        STD_TORCH_CHECK(latent >= 0 && latent < width, prefix, "indices holds ", latent, "; expected 0 to ", width - 1);
      }
    }
  }

  // One token's part of recon.
  template <typename T>
  void add(int64_t row, double scale, std::vector<Act<Accumulator<T>>>& acts, Decoder<T>& decoder) const {
    const T* value = static_cast<const T*>(tensors[0].data_ptr()) + row * capacity;
    const int32_t* index = static_cast<const int32_t*>(tensors[1].data_ptr()) + row * capacity;
    acts.clear();
    for (int32_t i = 0; i < static_cast<const int32_t*>(tensors[2].data_ptr())[row]; ++i) {
      acts.push_back({static_cast<Accumulator<T>>(value[i]), index[i]});
    }
    decoder.add(acts, static_cast<const T*>(tensors[3].data_ptr()), static_cast<const T*>(tensors[4].data_ptr()), scale);
  }

  std::vector<Tensor> tensors;
  int64_t capacity = 0, n_tokens = 0, width = 0, d_model = 0;
};

Tensor decode(Tensor values, Tensor indices, Tensor counts, Tensor W_dec, Tensor b_dec, MaybeTensor delta_values,
              MaybeTensor delta_indices, MaybeTensor delta_counts, MaybeTensor delta_W_dec, MaybeTensor delta_b_dec,
              Tensor alpha) {
  using torch::headeronly::ScalarType;
  const SparsePart base("", values, indices, counts, W_dec, b_dec);
  STD_TORCH_CHECK(alpha.dim() == 0 && alpha.is_cpu(), "alpha has shape ", shape_text(alpha),
                  "; expected a scalar [] on the CPU");
  std::optional<SparsePart> delta;
  for (const MaybeTensor* tensor : {&delta_indices, &delta_counts, &delta_W_dec, &delta_b_dec}) {
    STD_TORCH_CHECK(tensor->has_value() == delta_values.has_value(), "the delta's tensors: expected all five or none");
  }
  if (delta_values) {
    delta.emplace("delta_", *delta_values, *delta_indices, *delta_counts, *delta_W_dec, *delta_b_dec);
    STD_TORCH_CHECK(delta->n_tokens == base.n_tokens && delta->d_model == base.d_model &&
                        delta_values->scalar_type() == values.scalar_type(),
                    "delta_values has shape ", shape_text(*delta_values), "; expected the base's tokens and dtype, ",
                    shape_text(values), ", and its d_model");
  }
  std::vector<int64_t> shape(values.sizes().begin(), values.sizes().end() - 1);
  shape.push_back(base.d_model);
  const Tensor recon = torch::stable::empty(shape, values.scalar_type());
  const Tensor scale_tensor = torch::stable::to(alpha, ScalarType::Double);
  const double scale = *static_cast<const double*>(scale_tensor.data_ptr());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T> kernel = kernels<T>();
    T* to = static_cast<T*>(recon.data_ptr());
    torch::stable::parallel_for(0, base.n_tokens, 8, [&](int64_t begin, int64_t end) {
      Decoder<T> decoder(kernel, base.d_model);
      std::vector<Act<Accumulator<T>>> acts;
      for (int64_t row = begin; row < end; ++row) {
        decoder.clear();
        base.template add<T>(row, 1.0, acts, decoder);
        if (delta) delta->template add<T>(row, scale, acts, decoder);
        decoder.write(to + row * base.d_model, false);
      }
    });
  };
  switch (values.scalar_type()) {
    case ScalarType::Double: run(double()); break;
    case ScalarType::Float: run(float()); break;
    case ScalarType::BFloat16: run(c10::BFloat16()); break;
    default: STD_TORCH_CHECK(false, "values has a dtype without a CPU kernel; expected float64, float32 or bfloat16");
  }
  return recon;
}

}  // namespace
}  // namespace deltatc

STABLE_TORCH_LIBRARY_IMPL(deltatc, CPU, m) {
  m.impl("encode_packed", TORCH_BOX(&deltatc::encode_packed));
  m.impl("decode", TORCH_BOX(&deltatc::decode));
}
