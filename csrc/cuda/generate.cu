// Generation, up to 16 tokens: one cooperative launch, which a CUDA graph can hold. Every warp multiplies 16 latents at a
// time with all tokens, so that W_enc is read once, straight to registers; after a barrier of the whole grid, blocks take
// 256 columns of a token each.
#include "gather.h"
#include "tile.h"

namespace deltatc {
namespace {

constexpr int kWarps = kThreads / 32;

struct Generate {
  CudaTranscode job;
  unsigned* arrived;  // zero before the launch, as the next two
  int32_t* counts;    // [2][kFewTokens]
  int32_t* broken;    // [2][kFewTokens]
};

struct GenerateMemory {
  SelectMemory select;
  alignas(16) float sums[2][kWarps][256];
  float pre[1024];
  uint64_t kept[2][kMaxKeys];
};

struct alignas(16) Words {
  uint32_t values[4];
};

__device__ __forceinline__ Words load_words(const bf16* from, bool real) {
  return real ? *reinterpret_cast<const Words*>(from) : Words{{0, 0, 0, 0}};
}

// pre_acts of 16 latents and all tokens, by one warp; what is active goes to the tokens' lists. Inner positions are
// multiplied in another order than they lie, the same for both factors, so that a lane loads 16 bytes at once.
__device__ __forceinline__ void encode_latents(const Generate& all, int p, int first, int lane) {
  const CudaTranscode& job = all.job;
  const CudaPart& part = job.parts[p];
  const int g = lane / 4, t = lane % 4, tokens = static_cast<int>(job.tokens);
  const int64_t d_model = job.d_model;
  const bf16* upper = part.W_enc + (first + g) * d_model;
  const bf16* lower = upper + 8 * d_model;
  const bool has_upper = first + g < part.width, has_lower = first + g + 8 < part.width;
  float acc[2][4] = {};
#pragma unroll 4
  for (int64_t c = t * 8; c < d_model + t * 8; c += 32) {
    const bool real = c < d_model;
    const Words a0 = load_words(upper + c, real && has_upper), a1 = load_words(lower + c, real && has_lower);
    const uint32_t front[4] = {a0.values[0], a1.values[0], a0.values[1], a1.values[1]};
    const uint32_t back[4] = {a0.values[2], a1.values[2], a0.values[3], a1.values[3]};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (side * 8 >= tokens) break;
      const int token = side * 8 + g;
      const Words b = load_words(job.x + token * d_model + c, real && token < tokens);
      multiply_add(acc[side], front, b.values[0], b.values[1]);
      multiply_add(acc[side], back, b.values[2], b.values[3]);
    }
  }
  for (int side = 0; side < 2; ++side) {
    for (int e = 0; e < 4; ++e) {
      const int latent = first + g + e / 2 * 8, token = side * 8 + t * 2 + e % 2;
      if (latent >= part.width || token >= tokens) continue;
      const float pre = acc[side][e] + to_float(part.b_enc[latent]);
      if (!is_finite(pre)) atomicOr(&all.broken[p * kFewTokens + token], 1);
      if (!(pre > to_threshold(part.threshold[latent]))) continue;
      const int slot = atomicAdd(&all.counts[p * kFewTokens + token], 1);
      part.lists.acts[static_cast<int64_t>(token) * part.lists.capacity + slot] = {pre, latent};
    }
  }
}

// 256 columns of one token. The warps share the acts, and their sums are added in the warps' order.
__device__ __forceinline__ void decode_columns(const Generate& all, int64_t token, int64_t slab, GenerateMemory& memory) {
  const CudaTranscode& job = all.job;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t d_model = job.d_model, column = slab * 256 + lane * 8;
  const float alpha = *job.alpha;
  const bool mine = column < d_model;
  bool broken = false;
  for (int p = 0; p < job.n_parts; ++p) {
    const CudaPart& part = job.parts[p];
    const Act* acts = part.lists.acts + token * part.lists.capacity;
    uint64_t* kept = memory.kept[p];
    int n = all.counts[p * kFewTokens + token];
    bool spoiled = all.broken[p * kFewTokens + token] != 0;
    Columns sum = {};
    __syncthreads();  // everyone has left what `memory` held before
    if (spoiled) {
      if (thread == 0 && slab == 0) write_stats(part, token, true, 0, 0.0f);
    } else if (part.k == 0 && n > kMaxKeys) {
      const Whole whole = add_all_latents(sum, part, job.x + token * d_model, job.d_model, mine && warp == 0, column,
                                          memory.pre, 1024);
      spoiled = whole.broken;
      if (thread == 0 && slab == 0) write_stats(part, token, whole.broken, whole.l0, whole.l1);
    } else {
      if (part.k > 0 && n > part.k) {
        select_largest(acts, n, part.k, kept, memory.select);
        n = part.k;
      } else {
        for (int i = thread; i < n; i += kThreads) kept[i] = key_by_index(acts[i]);
      }
      sort_keys(kept, n);
      if (slab == 0 && warp == 0) {
        const float l1 = sum_acts(kept, n, lane);
        if (lane == 0) write_stats(part, token, false, n, l1);
      }
      if (mine) add_acts(sum, kept, n, warp, kWarps, part.W_dec, d_model, column);
    }
    for (int i = 0; i < 8; ++i) memory.sums[p][warp][lane * 8 + i] = sum.values[i];
    broken |= spoiled && (p == 0 || alpha != 0.0f);
  }
  __syncthreads();
  const int64_t c = slab * 256 + thread;
  if (c >= d_model) return;
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += memory.sums[0][w][thread];
  total += to_float(job.parts[0].b_dec[c]);
  if (job.n_parts > 1 && alpha != 0.0f) {
    float delta = 0.0f;
    for (int w = 0; w < kWarps; ++w) delta += memory.sums[1][w][thread];
    total += alpha * (delta + to_float(job.parts[1].b_dec[c]));
  }
  job.recon[token * d_model + c] = broken ? bf16{0x7fc0} : to_bf16(total);
}

__global__ void __launch_bounds__(kThreads) generate_kernel(Generate all) {
  GenerateMemory& memory = *reinterpret_cast<GenerateMemory*>(shared_memory());
  const CudaTranscode& job = all.job;
  const int lane = threadIdx.x % 32;
  int groups[2] = {0, 0};
  for (int p = 0; p < job.n_parts; ++p) groups[p] = (job.parts[p].width + 15) / 16;
  for (int i = blockIdx.x * kWarps + threadIdx.x / 32; i < groups[0] + groups[1]; i += gridDim.x * kWarps) {
    const int p = i >= groups[0];
    encode_latents(all, p, (i - p * groups[0]) * 16, lane);
  }
  grid_barrier(all.arrived, gridDim.x);
  const int64_t slabs = (job.d_model + 255) / 256;
  for (int64_t item = blockIdx.x; item < job.tokens * slabs; item += gridDim.x) {
    decode_columns(all, item / slabs, item % slabs, memory);
  }
}

}  // namespace

// counters: 1 + 4 * kFewTokens, in the workspace
int launch_generate(const CudaTranscode& job, int32_t* counters, cudaStream_t stream) {
  const int64_t n_counters = 1 + 4 * kFewTokens;
  int error = clear(counters, n_counters * sizeof(int32_t), stream);
  if (error != 0) return error;
  int blocks = 0;
  error = multiprocessors(&blocks);
  if (error != 0) return error;
  const Generate all{job, reinterpret_cast<unsigned*>(counters), counters + 1, counters + 1 + 2 * kFewTokens};
  return launch(generate_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, sizeof(GenerateMemory), stream, all, true);
}

}  // namespace deltatc
