// What one block does for one token: bring its acts of a part together, in the order of their latents, and add up the
// rows of W_dec that they choose.
#pragma once

#include "select.h"

namespace deltatc {

__host__ __device__ inline int power_of_two(int n) {
  int size = 1;
  while (size < n) size *= 2;
  return size;
}

__host__ __device__ inline int list_room(const CudaPart& part) { return part.lists.splits * part.lists.capacity; }

// Acts that its lists hold in the end: of each list at most k.
__host__ __device__ inline int found_room(const CudaPart& part) {
  return part.k > 0 && part.k < part.lists.capacity ? part.lists.splits * part.k : list_room(part);
}

__host__ __device__ inline int kept_room(const CudaPart& part) {
  return power_of_two(part.k > 0 && part.k < found_room(part) ? part.k : found_room(part));
}

constexpr int64_t kKeptAt = (sizeof(SelectMemory) + 15) / 16 * 16;  // in shared memory, behind what selection needs

struct Collected {
  int n;          // acts, in `kept`; 0 where broken or too many
  bool broken;    // a pre_act is not finite
  bool too_many;  // more than its lists hold
};

// Acts of one token and part, as keys by index, sorted, into kept[kept_room]; found[found_room] is scratch.
__device__ __forceinline__ Collected collect(const CudaPart& part, int64_t token, Act* found, uint64_t* kept,
                                             SelectMemory& memory) {
  const Lists& lists = part.lists;
  Collected out{0, false, false};
  for (int split = 0; split < lists.splits; ++split) {
    const int count = lists.counts[token * lists.splits + split];
    out.broken |= count == kBroken;
    out.too_many |= count > lists.capacity;
    const Act* acts = lists.acts + (token * lists.splits + split) * lists.capacity;
    for (int i = threadIdx.x; i < min(count, lists.capacity); i += blockDim.x) found[out.n + i] = acts[i];
    out.n += max(0, min(count, lists.capacity));
  }
  if (out.broken || out.too_many) out.n = 0;
  __syncthreads();
  if (part.k > 0 && out.n > part.k) {
    select_largest(found, out.n, part.k, kept, memory);
    out.n = part.k;
  } else {
    for (int i = threadIdx.x; i < out.n; i += blockDim.x) kept[i] = key_by_index(found[i]);
  }
  sort_keys(kept, out.n);
  return out;
}

// l0 and l1 of sorted acts, by one warp; every lane gets both.
__device__ __forceinline__ float sum_acts(const uint64_t* kept, int n, int lane) {
  float sum = 0.0f;
  for (int i = lane; i < n; i += 32) sum += act_of_index_key(kept[i]).value;
  return warp_sum(sum);
}

struct Columns {
  float values[8];
};

__device__ __forceinline__ void add_row(Columns& sum, float value, const bf16x8& row) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.values[i] += value * to_float(row.values[i]);
}

// sum += acts first, first + step, ... at columns [column, column + 8) of W_dec
__device__ __forceinline__ void add_acts(Columns& sum, const uint64_t* kept, int n, int first, int step,
                                         const bf16* W_dec, int64_t d_model, int64_t column) {
#pragma unroll 8
  for (int i = first; i < n; i += step) {
    const Act act = act_of_index_key(kept[i]);
    add_row(sum, act.value, *reinterpret_cast<const bf16x8*>(W_dec + act.index * d_model + column));
  }
}

// Where the lists do not hold the acts (JumpReLU only): pre_acts of all latents again, a warp each, `size` at a time,
// which each(first, count) finds in pre[count].
template <typename Each>
__device__ __forceinline__ void encode_again(const CudaPart& part, const bf16* x, int d_model, float* pre, int size,
                                             Each each) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int first = 0; first < part.width; first += size) {
    const int count = min(size, part.width - first);
    __syncthreads();
    for (int j = warp; j < count; j += warps) {
      const bf16* weights = part.W_enc + static_cast<int64_t>(first + j) * d_model;
      float dot = 0.0f;
      for (int c = lane * 8; c < d_model; c += 256) {
        const bf16x8 left = *reinterpret_cast<const bf16x8*>(x + c), right = *reinterpret_cast<const bf16x8*>(weights + c);
        for (int i = 0; i < 8; ++i) dot += to_float(left.values[i]) * to_float(right.values[i]);
      }
      dot = warp_sum(dot);
      if (lane == 0) pre[j] = dot + to_float(part.b_enc[first + j]);
    }
    __syncthreads();
    each(first, count);
  }
  __syncthreads();
}

__device__ __forceinline__ bool is_active(const CudaPart& part, int latent, float pre) {
  return pre > to_threshold(part.threshold[latent]);
}

struct Whole {
  int l0;
  float l1;
  bool broken;
};

// sum += all of the part's acts, as add_acts, without lists. Threads with `mine` false only help.
__device__ __forceinline__ Whole add_all_latents(Columns& sum, const CudaPart& part, const bf16* x, int d_model,
                                                 bool mine, int64_t column, float* pre, int pre_size) {
  Whole out{0, 0.0f, false};
  encode_again(part, x, d_model, pre, pre_size, [&](int first, int count) {
    for (int j = 0; j < count; ++j) {
      out.broken |= !is_finite(pre[j]);
      if (!is_active(part, first + j, pre[j])) continue;
      out.l0 += 1, out.l1 += pre[j];
      const bf16* row = part.W_dec + static_cast<int64_t>(first + j) * d_model;
      if (mine) add_row(sum, pre[j], *reinterpret_cast<const bf16x8*>(row + column));
    }
  });
  return out;
}

// Eight columns of recon from the parts' sums there; delta_b_dec is null without a delta. alpha = 0 leaves the base's
// bits.
__device__ __forceinline__ void write_columns(bf16* to, const Columns (&sums)[2], const bf16* b_dec,
                                              const bf16* delta_b_dec, float alpha, bool broken) {
  bf16x8 out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float total = sums[0].values[i] + to_float(b_dec[i]);
    if (delta_b_dec != nullptr && alpha != 0.0f) total += alpha * (sums[1].values[i] + to_float(delta_b_dec[i]));
    out.values[i] = broken ? bf16{0x7fc0} : to_bf16(total);
  }
  *reinterpret_cast<bf16x8*>(to) = out;
}

__device__ __forceinline__ void write_stats(const CudaPart& part, int64_t token, bool broken, int l0, float l1) {
  if (part.l0 == nullptr) return;
  part.l0[token] = broken ? bits_float(0x7fc00000u) : static_cast<float>(l0);
  part.l1[token] = broken ? bits_float(0x7fc00000u) : l1;
}

}  // namespace deltatc
