// torch.ops.deltatc for CUDA tensors: the fused forward pass and its gradients. kernels.h does the work.
#include "binding.h"

namespace deltatc {
namespace {

CudaPart part_of(const std::string& prefix, const Tensor& x, const Tensor& rows, const Tensor& b_enc,
                 const Tensor& threshold, const Tensor& W_dec, const Tensor& b_dec, Held& held) {
  CudaPart part = encoder_of(prefix, x, rows, b_enc, threshold, held);
  const int64_t d_model = x.size(x.dim() - 1);
  part.W_dec = held(prefix + "W_dec", W_dec, x, {part.width, d_model});
  part.b_dec = held(prefix + "b_dec", b_dec, x, {d_model});
  return part;
}

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Stats transcode_packed(Tensor x, Tensor rows, MaybeTensor, Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec,
                       MaybeTensor delta_rows, MaybeTensor, MaybeTensor delta_b_enc, MaybeTensor delta_threshold,
                       MaybeTensor delta_W_dec, MaybeTensor delta_b_dec, Tensor alpha, MaybeInt k_base,
                       MaybeInt k_delta, bool want_stats) {
  check_model("x", x);
  const OnDevice here(x);
  const bool has_delta = delta_rows.has_value();
  for (const MaybeTensor* tensor : {&delta_b_enc, &delta_threshold, &delta_W_dec, &delta_b_dec}) {
    STD_TORCH_CHECK(tensor->has_value() == has_delta, "the delta_* tensors: expected all five or none");
  }
  STD_TORCH_CHECK(has_delta || !k_delta, "k_delta is given without a delta");
  Held held;
  CudaTranscode job{};
  job.parts[0] = part_of("", x, rows, b_enc, threshold, W_dec, b_dec, held);
  job.parts[0].k = check_limit("k_base", k_base, job.parts[0].width);
  if (has_delta) {
    job.parts[1] =
        part_of("delta_", x, *delta_rows, *delta_b_enc, *delta_threshold, *delta_W_dec, *delta_b_dec, held);
    job.parts[1].k = check_limit("k_delta", k_delta, job.parts[1].width);
  }
  const Tensor recon = torch::stable::new_empty(x, x.sizes());
  const std::vector<int64_t> leading = leading_of(x);
  std::vector<Tensor> stats;
  for (int i = 0; i < 4; ++i) {
    const auto shape = want_stats ? leading : std::vector<int64_t>{0};
    stats.push_back(torch::stable::new_empty(x, shape, ScalarType::Float));
    if (want_stats && i >= 2 && !has_delta) torch::stable::zero_(stats[i]);
  }

  job.x = held.values(x);
  job.recon = static_cast<bf16*>(recon.data_ptr());
  job.alpha = held.scalar("alpha", alpha, x);
  job.d_model = static_cast<int32_t>(x.size(x.dim() - 1));
  job.tokens = x.numel() / job.d_model;
  job.n_parts = has_delta ? 2 : 1;
  for (int p = 0; want_stats && p < job.n_parts; ++p) {
    job.parts[p].l0 = static_cast<float*>(stats[2 * p].data_ptr());
    job.parts[p].l1 = static_cast<float*>(stats[2 * p + 1].data_ptr());
  }
  if (job.tokens > 0) {
    const Tensor workspace = torch::stable::new_empty(x, {transcode_workspace(job)}, ScalarType::Byte);
    check_launch(transcode(job, workspace.data_ptr(), current_stream(x)), "transcode");
  }
  return {recon, stats[0], stats[1], stats[2], stats[3]};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients delta_backward(Tensor grad, Tensor x, Tensor rows, Tensor b_enc, Tensor threshold, Tensor W_dec,
                         Tensor b_dec, Tensor alpha, double bandwidth, int64_t needed) {
  check_model("x", x);
  const OnDevice here(x);
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type() && grad.is_cpu() == x.is_cpu(),
                  "grad has shape ", shape_text(grad), "; expected that of x, ", shape_text(x), ", its dtype and device");
  Held held;
  CudaBackward job{};
  job.delta = part_of("delta_", x, rows, b_enc, threshold, W_dec, b_dec, held);
  const int64_t width = job.delta.width, d_model = x.size(x.dim() - 1);
  const std::vector<int64_t> shapes[6] = {{d_model, width}, {width}, {width}, {width, d_model}, {d_model}, {}};
  std::vector<Tensor> found;
  for (int i = 0; i < 6; ++i) {
    const auto shape = needed >> i & 1 ? shapes[i] : std::vector<int64_t>{0};
    found.push_back(torch::stable::new_empty(x, shape, ScalarType::Float));
    torch::stable::zero_(found[i]);
  }
  const auto wanted = [&](int i) {
    return needed >> i & 1 && found[i].numel() > 0 ? static_cast<float*>(found[i].data_ptr()) : nullptr;
  };
  job.x = held.values(x);
  job.grad = held.values(grad);
  job.alpha = held.scalar("alpha", alpha, x);
  job.tokens = x.numel() / d_model;
  job.d_model = static_cast<int32_t>(d_model);
  job.bandwidth = static_cast<float>(bandwidth);
  job.W_enc = wanted(0), job.b_enc = wanted(1), job.threshold = wanted(2);
  job.W_dec = wanted(3), job.b_dec = wanted(4), job.scale = wanted(5);
  if (job.tokens > 0) {
    const Tensor workspace = torch::stable::new_empty(x, {backward_workspace(job)}, ScalarType::Byte);
    check_launch(backward(job, workspace.data_ptr(), current_stream(x)), "delta_backward");
  }
  return {found[0], found[1], found[2], found[3], found[4], found[5]};
}

#ifdef DELTATC_HOST_SHIM
int64_t workspace(int64_t tokens, int64_t d_model, int64_t width, int64_t d_new, MaybeInt k) {
  CudaTranscode job{};
  job.tokens = tokens, job.d_model = static_cast<int32_t>(d_model), job.n_parts = 2;
  job.parts[0].width = static_cast<int32_t>(width), job.parts[1].width = static_cast<int32_t>(d_new);
  for (CudaPart& part : job.parts) part.k = static_cast<int32_t>(k.value_or(0));
  return transcode_workspace(job);
}
#endif

}  // namespace
}  // namespace deltatc

#ifdef DELTATC_HOST_SHIM
STABLE_TORCH_LIBRARY(deltatc_shim, m) {
  m.def("transcode_packed(Tensor x, Tensor rows, Tensor? screen, Tensor b_enc, Tensor threshold, Tensor W_dec, "
        "Tensor b_dec, Tensor? delta_rows, Tensor? delta_screen, Tensor? delta_b_enc, Tensor? delta_threshold, "
        "Tensor? delta_W_dec, Tensor? delta_b_dec, Tensor alpha, int? k_base, int? k_delta, bool want_stats) "
        "-> (Tensor recon, Tensor l0_base, Tensor l1_base, Tensor l0_delta, Tensor l1_delta)");
  m.def("delta_backward(Tensor grad, Tensor x, Tensor rows, Tensor b_enc, Tensor threshold, Tensor W_dec, "
        "Tensor b_dec, Tensor alpha, float bandwidth, int needed) "
        "-> (Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec, Tensor alpha)");
  m.def("encode_packed(Tensor x, Tensor rows, Tensor? screen, Tensor b_enc, Tensor threshold, int? k, int? capacity) "
        "-> (Tensor values, Tensor indices, Tensor counts)");
  m.def("decode_acts(Tensor values, Tensor indices, Tensor counts, Tensor W_dec, Tensor b_dec, Tensor? delta_values, "
        "Tensor? delta_indices, Tensor? delta_counts, Tensor? delta_W_dec, Tensor? delta_b_dec, Tensor alpha) "
        "-> Tensor recon");
  m.def("workspace(int tokens, int d_model, int width, int d_new, int? k) -> int");  // bytes, for the tests
}

STABLE_TORCH_LIBRARY_IMPL(deltatc_shim, CompositeExplicitAutograd, m) {
  m.impl("workspace", TORCH_BOX(&deltatc::workspace));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(DTC_LIBRARY, DTC_KEY, m) {
  m.impl("transcode_packed", TORCH_BOX(&deltatc::transcode_packed));
  m.impl("delta_backward", TORCH_BOX(&deltatc::delta_backward));
}
