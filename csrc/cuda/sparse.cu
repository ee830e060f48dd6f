// Acts as values, indices and counts: compact_kernel makes them of the lists that encoding leaves, decode_acts_kernel
// reads them; both a token a block. check_kernel looks at what somebody else gives before it is read.
#include "gather.h"
#include "tile.h"

namespace deltatc {
namespace {

constexpr int kPiece = 1024;  // acts, or pre_acts, of a token in shared memory at a time

// Into slots below `capacity` of one token.
struct Slots {
  __device__ void write(int64_t slot, float value, int32_t latent) const {
    if (slot < capacity) values[slot] = to_bf16(value), indices[slot] = latent;
  }
  bf16* values;
  int32_t* indices;
  int64_t capacity;
};

// All acts of a token that has too many for its lists; returns how many, or kBroken.
__device__ __forceinline__ int compact_all_latents(const CudaPart& part, const bf16* x, int d_model, float* pre,
                                                   const Slots& to) {
  const int lane = threadIdx.x % 32;
  int n = 0;
  bool broken = false;
  encode_again(part, x, d_model, pre, kPiece, [&](int first, int count) {
    for (int start = 0; start < count; start += 32) {  // every warp counts, the first writes
      const int j = start + lane;
      const float value = j < count ? pre[j] : 0.0f;
      const bool active = j < count && is_active(part, first + j, value);
      const unsigned all = warp_ballot(active);
      broken |= warp_ballot(!is_finite(value)) != 0;
      if (active && threadIdx.x < 32) to.write(n + __popc(all & ((1u << lane) - 1u)), value, first + j);
      n += __popc(all);
    }
  });
  return broken ? kBroken : n;
}

__global__ void __launch_bounds__(kThreads, 4) compact_kernel(CudaEncode job) {
  const int64_t token = blockIdx.x;
  const int thread = threadIdx.x, d_model = job.of.d_model;
  const CudaPart& part = job.of.parts[0];
  SelectMemory& memory = *reinterpret_cast<SelectMemory*>(shared_memory());
  uint64_t* kept = reinterpret_cast<uint64_t*>(shared_memory() + kKeptAt);
  Act* found = reinterpret_cast<Act*>(kept + kept_room(part));
  const Slots to{job.values + token * job.capacity, job.indices + token * job.capacity, job.capacity};

  const Collected acts = collect(part, token, found, kept, memory);
  int n = acts.broken ? kBroken : acts.n;
  if (acts.too_many && !acts.broken) {
    n = compact_all_latents(part, job.of.x + token * d_model, d_model, reinterpret_cast<float*>(found), to);
  }
  for (int i = thread; i < acts.n; i += kThreads) {
    const Act act = act_of_index_key(kept[i]);
    to.write(i, act.value, act.index);
  }
  if (n == kBroken) {
    n = 1;
    if (thread == 0) to.write(0, bits_float(0x7fc00000u), 0);
  }
  for (int64_t i = n + thread; i < job.capacity; i += kThreads) to.write(i, 0.0f, 0);
  if (thread == 0) {
    job.counts[token] = n;
    atomicMax(job.largest, n);
  }
}

// A warp a token at a time.
__global__ void __launch_bounds__(kThreads, 4) check_kernel(CudaDecode job) {
  const int lane = threadIdx.x % 32;
  const auto report = [&](int p, int what, int32_t value) {
    atomicMax(&job.bad[p * 2 + what], 1ull << 32 | static_cast<uint32_t>(value));
  };
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t token = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32; token < job.tokens;
       token += warps) {
    for (int p = 0; p < job.n_parts; ++p) {
      const SparsePart& part = job.parts[p];
      const int32_t count = part.counts[token];
      if (count < 0 || count > part.capacity) {
        if (lane == 0) report(p, 0, count);
        continue;
      }
      for (int i = lane; i < count; i += 32) {
        const int32_t latent = part.indices[token * part.capacity + i];
        if (latent < 0 || latent >= part.width) report(p, 1, latent);
      }
    }
  }
}

__global__ void __launch_bounds__(kMaxModel / 8, 1) decode_acts_kernel(CudaDecode job) {
  const int64_t token = blockIdx.x;
  const int thread = threadIdx.x, d_model = job.d_model, column = thread * 8;
  const bool mine = column < d_model;
  const float alpha = *job.alpha;
  uint64_t* kept = reinterpret_cast<uint64_t*>(shared_memory());
  Columns sums[2] = {};
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    if (p >= job.n_parts || (p == 1 && alpha == 0.0f)) break;
    const SparsePart& part = job.parts[p];
    const int n = part.counts[token];
    for (int first = 0; first < n; first += kPiece) {
      const int64_t from = token * part.capacity + first;
      const int count = min(kPiece, n - first);
      __syncthreads();
      for (int i = thread; i < count; i += blockDim.x) {
        kept[i] = key_by_index({to_float(part.values[from + i]), part.indices[from + i]});
      }
      __syncthreads();
      if (mine) add_acts(sums[p], kept, count, 0, 1, part.W_dec, d_model, column);
    }
  }
  if (!mine) return;
  const bf16* delta_b_dec = job.n_parts > 1 ? job.parts[1].b_dec + column : nullptr;
  write_columns(job.recon + token * d_model + column, sums, job.parts[0].b_dec + column, delta_b_dec, alpha, false);
}

}  // namespace

int launch_compact(const CudaEncode& job, cudaStream_t stream) {
  const CudaPart& part = job.of.parts[0];
  const int64_t lists = found_room(part) * static_cast<int64_t>(sizeof(Act)), pre = kPiece * sizeof(float);
  const int64_t shared = kKeptAt + kept_room(part) * sizeof(uint64_t) + (lists > pre ? lists : pre);
  return launch(compact_kernel, dim3(static_cast<unsigned>(job.of.tokens)), kThreads, shared, stream, job);
}

int check_acts(const CudaDecode& job, cudaStream_t stream) {
  const int64_t blocks = (job.tokens + kThreads / 32 - 1) / (kThreads / 32);
  return launch(check_kernel, dim3(static_cast<unsigned>(blocks < 1024 ? blocks : 1024)), kThreads, 0, stream, job);
}

int decode(const CudaDecode& job, cudaStream_t stream) {
  const int threads = (job.d_model / 8 + 31) / 32 * 32;
  return launch(decode_acts_kernel, dim3(static_cast<unsigned>(job.tokens)), threads, kPiece * sizeof(uint64_t), stream,
                job);
}

}  // namespace deltatc
