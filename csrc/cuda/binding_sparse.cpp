// torch.ops.deltatc for CUDA tensors: encoding and decoding by themselves. kernels.h does the work. What the host has
// to know is read back from the device, which waits for the stream; each place says so.
#include "binding.h"

namespace deltatc {
namespace {

constexpr int64_t kUsualActs = 512;  // of a token: what the first try has room for where nobody gives a capacity

using Sparse = std::tuple<Tensor, Tensor, Tensor>;

Tensor to_host(const Tensor& tensor) {
  return torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

Sparse encode_packed(Tensor x, Tensor rows, MaybeTensor, Tensor b_enc, Tensor threshold, MaybeInt k,
                     MaybeInt capacity) {
  check_model("x", x);
  const OnDevice here(x);
  Held held;
  CudaEncode job{};
  job.of.parts[0] = encoder_of("", x, rows, b_enc, threshold, held);
  const int32_t width = job.of.parts[0].width;
  job.of.parts[0].k = check_limit("k", k, width);
  STD_TORCH_CHECK(!capacity || *capacity >= 1, "capacity = ", capacity.value_or(0), "; expected 1 or more, or None");
  job.of.x = held.values(x);
  job.of.d_model = static_cast<int32_t>(x.size(x.dim() - 1));
  job.of.tokens = x.numel() / job.of.d_model;
  job.of.n_parts = 1;
  Tensor largest = torch::stable::new_empty(x, {1}, ScalarType::Int);
  torch::stable::zero_(largest);
  job.largest = static_cast<int32_t*>(largest.data_ptr());

  const auto run = [&](int64_t room) -> Sparse {
    const std::vector<int64_t> leading = leading_of(x);
    std::vector<int64_t> shape = leading;
    shape.push_back(room);
    const Tensor values = torch::stable::new_empty(x, shape);
    const Tensor indices = torch::stable::new_empty(x, shape, ScalarType::Int);
    const Tensor counts = torch::stable::new_empty(x, leading, ScalarType::Int);
    job.values = static_cast<bf16*>(values.data_ptr());
    job.indices = static_cast<int32_t*>(indices.data_ptr());
    job.counts = static_cast<int32_t*>(counts.data_ptr());
    job.capacity = room;
    if (job.of.tokens > 0) {
      const Tensor workspace = torch::stable::new_empty(x, {encode_workspace(job)}, ScalarType::Byte);
      check_launch(encode(job, workspace.data_ptr(), current_stream(x)), "encode");
    }
    return {values, indices, counts};
  };

  const int64_t most = k.value_or(width), room = capacity.value_or(most < kUsualActs ? most : kUsualActs);
  const Sparse found = run(room);
  if (capacity && room >= most) return found;  // also TopK: nothing to know
  const Tensor on_host = to_host(largest);     // waits for the stream
  const int64_t count = *static_cast<const int32_t*>(on_host.data_ptr());
  STD_TORCH_CHECK(!capacity || count <= *capacity, "a token has ", count, " active latents, over capacity = ",
                  capacity.value_or(0), "; raise capacity, or give None for no limit");
  if (capacity) return found;
  if (count > room) return run(count);
  const auto cut = [&](Tensor tensor) {
    int64_t axis = tensor.dim() - 1;
    return torch::stable::contiguous(torch::stable::narrow(tensor, axis, 0, count));
  };
  return {cut(std::get<0>(found)), cut(std::get<1>(found)), std::get<2>(found)};
}

SparsePart acts_of(const std::string& prefix, const Tensor& values, const Tensor& indices, const Tensor& counts,
                   const Tensor& W_dec, const Tensor& b_dec, int64_t d_model, Held& held) {
  STD_TORCH_CHECK(values.dim() >= 1 && W_dec.dim() == 2, prefix, "values has shape ", shape_text(values), " and ",
                  prefix, "W_dec ", shape_text(W_dec), "; expected [..., capacity] and [d_sae, d_model]");
  SparsePart part{};
  part.capacity = values.size(values.dim() - 1);
  part.width = check_width(prefix + "W_dec", W_dec.size(0));
  part.values = held.values(values);
  part.indices = held.integers(prefix + "indices", indices, values, values.sizes());
  part.counts = held.integers(prefix + "counts", counts, values, leading_of(values));
  part.W_dec = held(prefix + "W_dec", W_dec, values, {part.width, d_model});
  part.b_dec = held(prefix + "b_dec", b_dec, values, {d_model});
  return part;
}

// Raises where a count or an index would lead decoding outside a tensor. Waits for the stream.
void check_acts_now(CudaDecode job, const Tensor& values) {
  Tensor bad = torch::stable::new_empty(values, {job.n_parts * 2}, ScalarType::Long);
  torch::stable::zero_(bad);
  job.bad = static_cast<unsigned long long*>(bad.data_ptr());
  check_launch(check_acts(job, current_stream(values)), "decode's check");
  const Tensor on_host = to_host(bad);
  for (int p = 0; p < job.n_parts; ++p) {
    const uint64_t* found = static_cast<const uint64_t*>(on_host.data_ptr()) + p * 2;
    const char* prefix = p == 0 ? "" : "delta_";
    STD_TORCH_CHECK(found[0] == 0, prefix, "counts holds ", static_cast<int32_t>(found[0]),
                    "; expected 0 to the capacity ", job.parts[p].capacity);
    STD_TORCH_CHECK(found[1] == 0, prefix, "indices holds ", static_cast<int32_t>(found[1]), "; expected 0 to ",
                    job.parts[p].width - 1);
  }
}

Tensor decode_acts(Tensor values, Tensor indices, Tensor counts, Tensor W_dec, Tensor b_dec, MaybeTensor delta_values,
                   MaybeTensor delta_indices, MaybeTensor delta_counts, MaybeTensor delta_W_dec,
                   MaybeTensor delta_b_dec, Tensor alpha) {
  check_model("W_dec", W_dec);
  const OnDevice here(W_dec);
  for (const MaybeTensor* tensor : {&delta_indices, &delta_counts, &delta_W_dec, &delta_b_dec}) {
    STD_TORCH_CHECK(tensor->has_value() == delta_values.has_value(), "the delta's tensors: expected all five or none");
  }
  Held held;
  CudaDecode job{};
  const int64_t d_model = W_dec.size(W_dec.dim() - 1);
  job.parts[0] = acts_of("", values, indices, counts, W_dec, b_dec, d_model, held);
  const std::vector<int64_t> leading = leading_of(values);
  if (delta_values) {
    job.parts[1] =
        acts_of("delta_", *delta_values, *delta_indices, *delta_counts, *delta_W_dec, *delta_b_dec, d_model, held);
    STD_TORCH_CHECK(leading_of(*delta_values) == leading && delta_values->is_cpu() == values.is_cpu(),
                    "delta_values has shape ", shape_text(*delta_values), "; expected the base's tokens, ",
                    shape_text(values), ", and its device");
  }
  std::vector<int64_t> shape = leading;
  shape.push_back(d_model);
  const Tensor recon = torch::stable::new_empty(values, shape);
  job.recon = static_cast<bf16*>(recon.data_ptr());
  job.alpha = held.scalar("alpha", alpha, values);
  job.tokens = recon.numel() / d_model;
  job.d_model = static_cast<int32_t>(d_model);
  job.n_parts = delta_values ? 2 : 1;
  if (job.tokens > 0) {
    check_acts_now(job, values);
    check_launch(decode(job, current_stream(values)), "decode");
  }
  return recon;
}

}  // namespace
}  // namespace deltatc

STABLE_TORCH_LIBRARY_IMPL(DTC_LIBRARY, DTC_KEY, m) {
  m.impl("encode_packed", TORCH_BOX(&deltatc::encode_packed));
  m.impl("decode_acts", TORCH_BOX(&deltatc::decode_acts));
}
