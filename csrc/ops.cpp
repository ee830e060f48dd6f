// Every schema of torch.ops.deltatc, in one place. Kernels register themselves beside their code (cpu/*.cpp,
// cuda/binding.cpp); deltatc/ops.py adds the fake kernels, autograd, the checks that name the argument, and the packed
// weights: transcode is transcode_packed with what pack(W_enc) made, which is kept until W_enc changes.
//
// Contract (T = the dtype of x: float64, float32 or bfloat16; all tensors on one device, any strides)
//
//   x                    [..., d_model] T       any leading shape, also empty
//   W_enc, b_enc         [d_model, d_sae], [d_sae] T
//   threshold            [d_sae] T              a negative threshold acts as 0
//   W_dec, b_dec         [d_sae, d_model], [d_model] T
//   delta_*              the same with d_new in place of d_sae; all five or none
//   alpha                [] floating point      scales the delta's part, its b_dec included
//   k_base, k_delta      1 <= k <= width        keep the k largest active latents (ties: lower index); None: all
//   bandwidth            > 0                    width of the rectangle kernel of the threshold's gradient
//
//   pre = x @ W_enc + b_enc; acts = pre where pre > max(threshold, 0), else 0; part(x) = acts @ W_dec + b_dec
//   recon = base(x) + alpha * delta(x)
//
//   recon                [..., d_model] T       alpha = 0: base(x) bit for bit; a non-finite row of x (or of its
//                                               pre_acts) gives NaN in that row and changes no other row
//   l0_*, l1_*           [...] float32          number and sum of acts a token, whatever alpha is; NaN in a NaN row
//   gradients            Tensor[7]              of x, delta W_enc, b_enc, threshold, W_dec, b_dec and alpha; an empty
//                                               tensor where `needed` is false
#include <torch/csrc/stable/library.h>

#include <string>

#define TRANSCODE_INPUTS                                                                          \
  "Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec, "          \
  "Tensor? delta_W_enc, Tensor? delta_b_enc, Tensor? delta_threshold, Tensor? delta_W_dec, "      \
  "Tensor? delta_b_dec, Tensor alpha, int? k_base, int? k_delta, float bandwidth"
#define DECODE_INPUTS                                                                              \
  "Tensor values, Tensor indices, Tensor counts, Tensor W_dec, Tensor b_dec, Tensor? delta_values, " \
  "Tensor? delta_indices, Tensor? delta_counts, Tensor? delta_W_dec, Tensor? delta_b_dec, Tensor alpha"

STABLE_TORCH_LIBRARY(deltatc, m) {
  m.def("transcode(" TRANSCODE_INPUTS ") -> Tensor recon");
  m.def("transcode_stats(" TRANSCODE_INPUTS
        ") -> (Tensor recon, Tensor l0_base, Tensor l1_base, Tensor l0_delta, Tensor l1_delta)");
  m.def("transcode_backward(Tensor grad, " TRANSCODE_INPUTS ", bool[] needed) -> Tensor[] gradients");
  // W_enc as the CPU kernels read it: its latents as rows [d_sae, d_model padded to 64 bytes], and their screen in eight
  // bits (cpu/screen.inc; empty where the CPU or dtype has no use for it). The CUDA kernels read [d_sae, d_model], and
  // no screen.
  m.def("pack(Tensor W_enc) -> (Tensor rows, Tensor screen)");
  m.def("transcode_packed(Tensor x, Tensor rows, Tensor? screen, Tensor b_enc, Tensor threshold, Tensor W_dec, "
        "Tensor b_dec, Tensor? delta_rows, Tensor? delta_screen, Tensor? delta_b_enc, Tensor? delta_threshold, "
        "Tensor? delta_W_dec, Tensor? delta_b_dec, Tensor alpha, int? k_base, int? k_delta, bool want_stats) "
        "-> (Tensor recon, Tensor l0_base, Tensor l1_base, Tensor l0_delta, Tensor l1_delta)");
  // A token's acts in the order of their latents: values [..., capacity] T, indices [..., capacity] int32, counts [...]
  // int32, zeros behind counts. JumpReLU: capacity None is the largest count; a count over capacity raises. TopK: the k
  // largest positive pre_acts (ties: lower index). A non-finite row is one act, NaN, so that decoding it gives NaN.
  m.def("encode_jumprelu(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, int? capacity) "
        "-> (Tensor values, Tensor indices, Tensor counts)");
  m.def("encode_topk(Tensor x, Tensor W_enc, Tensor b_enc, int k) -> (Tensor values, Tensor indices, Tensor counts)");
  m.def("encode_packed(Tensor x, Tensor rows, Tensor? screen, Tensor b_enc, Tensor threshold, int? k, int? capacity) "
        "-> (Tensor values, Tensor indices, Tensor counts)");
  // acts @ W_dec + b_dec + alpha * (delta_acts @ delta_W_dec + delta_b_dec): another alpha encodes nothing again
  m.def("decode(" DECODE_INPUTS ") -> Tensor recon");
  // The same by the kernel that CUDA devices have for bfloat16 (cuda/sparse.cu). It waits for the stream, because a
  // wrong count or index has to raise; so does encode_packed there, for the largest count, except with k as capacity.
  m.def("decode_acts(" DECODE_INPUTS ") -> Tensor recon");
  // The delta's gradients in float32, on CUDA devices (cuda/backward.cu); bit i of `needed`: the i-th is wanted, else empty
  m.def("delta_backward(Tensor grad, Tensor x, Tensor rows, Tensor b_enc, Tensor threshold, Tensor W_dec, "
        "Tensor b_dec, Tensor alpha, float bandwidth, int needed) "
        "-> (Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec, Tensor alpha)");
  m.def("cpu_kernels() -> str");  // instruction sets compiled in, the one in use first
  m.def("cuda_build() -> str");   // "nvcc's release+architecture+...", or "" without CUDA
}

namespace {

#define DTC_TEXT(tokens) #tokens
#define DTC_TEXT_OF(macro) DTC_TEXT(macro)

std::string cuda_build() {
#ifdef DELTATC_CUDA
  return DTC_TEXT_OF(DELTATC_CUDA);  // set by setup.py
#else
  return "";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deltatc, CompositeExplicitAutograd, m) { m.impl("cuda_build", TORCH_BOX(&cuda_build)); }
