// torch.ops.deltatc.transcode_packed on the CPU: float64, float32, bfloat16 (which computes in float32), through torch's
// own thread pool. A block of tokens at a time is encoded, then decoded; nothing of size tokens x latents exists.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "decode.h"
#include "encode.h"

namespace deltatc {
namespace {

template <typename T>
void write_stats(const Part<T>& part, int64_t token, const std::vector<Act<Accumulator<T>>>& acts, bool broken) {
  if (part.l0 == nullptr) return;
  double l1 = 0.0;
  for (const auto& act : acts) l1 += static_cast<double>(act.value);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  part.l0[token] = broken ? nan : static_cast<float>(acts.size());
  part.l1[token] = broken ? nan : static_cast<float>(l1);
}

template <typename T>
void run(const Transcode<T>& job) {
  const Kernels<T> kernel = kernels<T>();
  std::vector<const Part<T>*> parts = {&job.base};
  // At alpha = 0 the delta adds nothing, but its statistics may be asked for.
  if (job.has_delta && (job.alpha != 0.0 || job.delta.l0 != nullptr)) parts.push_back(&job.delta);
  if (job.tokens == 0) return;
  Encoded<T> found(kernel, parts, job.tokens, job.d_model);
  const int64_t n_blocks = (job.tokens + kBlock - 1) / kBlock;
  for (int64_t block = 0; block < n_blocks; ++block) {
    const int64_t first = job.tokens * block / n_blocks, rows = job.tokens * (block + 1) / n_blocks - first;
    found.encode(job.x + first * job.d_model, rows);
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      Decoder<T> decoder(kernel, job.d_model);
      std::vector<Act<Accumulator<T>>> acts;
      for (int64_t row = begin; row < end; ++row) {
        bool spoiled = false;
        decoder.clear();
        for (size_t p = 0; p < parts.size(); ++p) {
          const bool broken = found.collect(p, row, acts);
          const double scale = p == 0 ? 1.0 : job.alpha;
          write_stats(*parts[p], first + row, acts, broken);
          decoder.add(acts, parts[p]->W_dec, parts[p]->b_dec, scale);
          spoiled |= scale != 0.0 && broken;
        }
        decoder.write(job.recon + (first + row) * job.d_model, spoiled);
      }
    });
  }
}

// The tensors of one part, contiguous. Held while the kernel reads their pointers.
struct PartTensors : EncoderTensors {
  PartTensors(const std::string& prefix, const Tensor& x, const Tensor& rows, const MaybeTensor& screen,
              const Tensor& b_enc, const Tensor& threshold, const Tensor& W_dec, const Tensor& b_dec)
      : EncoderTensors(prefix, x, rows, screen, b_enc, threshold) {
    const int64_t d_model = x.size(x.dim() - 1);
    check_like((prefix + "W_dec").c_str(), W_dec, x, {width, d_model});
    check_like((prefix + "b_dec").c_str(), b_dec, x, {d_model});
    for (const Tensor* tensor : {&W_dec, &b_dec}) decoder.push_back(torch::stable::contiguous(*tensor));
  }

  template <typename T>
  Part<T> part(const MaybeInt& k) const {
    Part<T> part = EncoderTensors::part<T>(k);
    part.W_dec = static_cast<const T*>(decoder[0].data_ptr());
    part.b_dec = static_cast<const T*>(decoder[1].data_ptr());
    return part;
  }

  std::vector<Tensor> decoder;
};

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Stats transcode_packed(Tensor x, Tensor rows, MaybeTensor screen, Tensor b_enc, Tensor threshold, Tensor W_dec,
                       Tensor b_dec, MaybeTensor delta_rows, MaybeTensor delta_screen, MaybeTensor delta_b_enc,
                       MaybeTensor delta_threshold, MaybeTensor delta_W_dec, MaybeTensor delta_b_dec, Tensor alpha,
                       MaybeInt k_base, MaybeInt k_delta, bool want_stats) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() >= 1, "x is a scalar; expected [..., d_model]");
  STD_TORCH_CHECK(x.is_cpu(), "x is not on the CPU");
  STD_TORCH_CHECK(alpha.dim() == 0 && alpha.is_cpu(), "alpha has shape ", shape_text(alpha),
                  "; expected a scalar [] on the CPU");
  const PartTensors base("", x, rows, screen, b_enc, threshold, W_dec, b_dec);
  check_k("k_base", k_base, base.width);
  const bool has_delta = delta_rows.has_value();
  for (const MaybeTensor* tensor : {&delta_b_enc, &delta_threshold, &delta_W_dec, &delta_b_dec}) {
    STD_TORCH_CHECK(tensor->has_value() == has_delta, "the delta_* tensors: expected all five or none");
  }
  STD_TORCH_CHECK(has_delta || !k_delta, "k_delta is given without a delta");
  std::optional<PartTensors> delta;
  if (has_delta) {
    delta.emplace("delta_", x, *delta_rows, delta_screen, *delta_b_enc, *delta_threshold, *delta_W_dec, *delta_b_dec);
    check_k("k_delta", k_delta, delta->width);
  }

  const int64_t d_model = x.size(x.dim() - 1);
  const Tensor tokens = torch::stable::contiguous(x);
  const Tensor recon = torch::stable::empty(x.sizes(), x.scalar_type());
  const std::vector<int64_t> leading(x.sizes().begin(), x.sizes().end() - 1);
  const std::vector<int64_t> stats_shape = want_stats ? leading : std::vector<int64_t>{0};
  std::vector<Tensor> stats;
  for (int i = 0; i < 4; ++i) stats.push_back(torch::stable::empty(stats_shape, ScalarType::Float));
  if (want_stats && !has_delta) {
    for (int i = 2; i < 4; ++i) torch::stable::zero_(stats[i]);
  }
  const Tensor scale = torch::stable::to(alpha, ScalarType::Double);

  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    const auto ask = [&](Part<T> part, int first) {
      if (want_stats) {
        part.l0 = static_cast<float*>(stats[first].data_ptr());
        part.l1 = static_cast<float*>(stats[first + 1].data_ptr());
      }
      return part;
    };
    Transcode<T> job;
    job.tokens = 1;
    for (int64_t size : leading) job.tokens *= size;
    job.d_model = d_model;
    job.x = static_cast<const T*>(tokens.data_ptr());
    job.recon = static_cast<T*>(recon.data_ptr());
    job.base = ask(base.part<T>(k_base), 0);
    job.has_delta = has_delta;
    if (has_delta) job.delta = ask(delta->part<T>(k_delta), 2);
    job.alpha = *static_cast<const double*>(scale.data_ptr());
    run(job);
  };
  switch (x.scalar_type()) {
    case ScalarType::Double: launch(double()); break;
    case ScalarType::Float: launch(float()); break;
    case ScalarType::BFloat16: launch(c10::BFloat16()); break;
    default: STD_TORCH_CHECK(false, "x has a dtype without a CPU kernel; expected float64, float32 or bfloat16");
  }
  return {recon, stats[0], stats[1], stats[2], stats[3]};
}

}  // namespace
}  // namespace deltatc

STABLE_TORCH_LIBRARY_IMPL(deltatc, CPU, m) { m.impl("transcode_packed", TORCH_BOX(&deltatc::transcode_packed)); }
