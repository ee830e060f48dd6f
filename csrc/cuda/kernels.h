// The CUDA kernels' plain interface: pointers, sizes, a workspace, a stream; an error code (a cudaError_t, 0: none) comes
// back. Nothing here allocates, synchronises, or knows torch. All tensors are contiguous bfloat16 on one device, and
// d_model is a multiple of 8 (16-byte loads), at most kMaxModel.
#pragma once

#include <cstdint>

#ifdef DELTATC_HOST_SHIM
#include "shim.h"
#else
#include <cuda_runtime.h>
#endif

namespace deltatc {

struct bf16;

constexpr int kMaxModel = 8192;  // d_model: eight columns a thread of one block
constexpr int kMaxKeys = 4096;   // acts of one token and part that selection holds in shared memory: also the largest k
constexpr int kFewTokens = 16;   // up to so many tokens, one cooperative launch streams the weights

struct Act {
  float value;
  int32_t index;
};

// One part's acts of each token as encoding leaves them: each of `splits` blocks of threads has its own ranges of
// latents and its own list. counts are true ones, also above capacity; kBroken: a pre_act was not finite.
constexpr int32_t kBroken = -1;
struct Lists {
  Act* acts;        // [tokens][splits][capacity]
  int32_t* counts;  // [tokens][splits]
  int32_t splits, capacity;
};

struct CudaPart {
  const bf16* W_enc;      // [width][d_model]: K-major
  const bf16* b_enc;      // [width]
  const bf16* threshold;  // [width]
  const bf16* W_dec;      // [width][d_model]
  const bf16* b_dec;      // [d_model]
  int32_t width;
  int32_t k;   // 0: all active latents are kept
  float* l0;   // [tokens], or null
  float* l1;
  Lists lists;  // filled in by the launch, in the workspace
};

struct CudaTranscode {
  const bf16* x;  // [tokens][d_model]
  bf16* recon;    // [tokens][d_model]
  const float* alpha;
  int64_t tokens;
  int32_t d_model, n_parts;  // base; or base and delta
  CudaPart parts[2];
  int32_t dense_above;  // a token with more acts of the base is decoded by matrix products
  int32_t* dense_rows;  // [tokens] of the chunk, in the workspace
  int32_t* dense_count;
};

// Gradients of the delta at a given gradient of recon; null where one is not wanted.
struct CudaBackward {
  const bf16* x;     // [tokens][d_model]
  const bf16* grad;  // [tokens][d_model]
  const float* alpha;
  int64_t tokens;
  int32_t d_model;
  float bandwidth;
  CudaPart delta;   // its k is 0
  float* W_enc;     // [d_model][width]
  float* b_enc;     // [width]
  float* threshold; // [width]
  float* W_dec;     // [width][d_model]
  float* b_dec;     // [d_model]
  float* scale;     // [1]: alpha's
  bf16* acts;       // [tokens][width], in the workspace: alpha * acts
  bf16* slopes;     // [tokens][width]: gradient of pre_acts
  float* sums;      // partial sums, added up in one fixed order
};

// One part's acts by themselves, as decoding reads them again: a token's in the order of their latents, zeros behind
// its count. A token that is not finite has one act, NaN at latent 0.
struct CudaEncode {
  CudaTranscode of;  // x, tokens, d_model and the part, which needs no decoder
  bf16* values;      // [tokens][capacity]
  int32_t* indices;  // [tokens][capacity]
  int32_t* counts;   // [tokens]: true ones, also above capacity
  int32_t* largest;  // [1]: the largest of counts and of what was there before
  int64_t capacity;
};

struct SparsePart {
  const bf16* values;
  const int32_t* indices;
  const int32_t* counts;
  const bf16* W_dec;  // [width][d_model]
  const bf16* b_dec;  // [d_model]
  int64_t capacity;
  int32_t width;
};

struct CudaDecode {
  SparsePart parts[2];
  bf16* recon;  // [tokens][d_model]
  const float* alpha;
  int64_t tokens;
  int32_t d_model, n_parts;
  unsigned long long* bad;  // [n_parts][2]: see check_acts
};

int64_t transcode_workspace(const CudaTranscode& job);
int transcode(CudaTranscode job, void* workspace, cudaStream_t stream);
int64_t backward_workspace(const CudaBackward& job);
int backward(CudaBackward job, void* workspace, cudaStream_t stream);
int64_t encode_workspace(const CudaEncode& job);
int encode(CudaEncode job, void* workspace, cudaStream_t stream);

// Decoding reads what it is given: bad, zero before, has to be zero behind check_acts. A part's first is 2^32 + a count
// that is negative or above capacity, its second the same of an index outside W_dec.
int check_acts(const CudaDecode& job, cudaStream_t stream);
int decode(const CudaDecode& job, cudaStream_t stream);

// Launches of one chunk of tokens, lists in place; transcode() and encode() call them.
int launch_encode(const CudaTranscode& job, cudaStream_t stream);
int launch_decode(const CudaTranscode& job, cudaStream_t stream);
int launch_generate(const CudaTranscode& job, int32_t* counters, cudaStream_t stream);
int launch_compact(const CudaEncode& job, cudaStream_t stream);

}  // namespace deltatc
