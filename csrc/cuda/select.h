// The k largest of a list, exactly: larger value first, then lower index. A key holds both, so no two are equal; acts are
// positive, so that their bits have the order of their values.
#pragma once

#include "device.h"
#include "kernels.h"

namespace deltatc {

__device__ __forceinline__ uint64_t key_by_value(Act act) {
  return static_cast<uint64_t>(float_bits(act.value)) << 32 | ~static_cast<uint32_t>(act.index);
}

__device__ __forceinline__ uint64_t key_by_index(Act act) {
  return static_cast<uint64_t>(static_cast<uint32_t>(act.index)) << 32 | float_bits(act.value);
}

__device__ __forceinline__ Act act_of_index_key(uint64_t key) {
  return {bits_float(static_cast<uint32_t>(key)), static_cast<int32_t>(key >> 32)};
}

// One warp keeps the k largest of n > k acts in place, in their order; returns the least value kept.
__device__ __forceinline__ float keep_largest(Act* acts, int n, int k, int lane) {
  uint64_t least = 0;  // the k-th largest key, bit by bit from the highest
  for (int bit = 62; bit >= 0; --bit) {
    const uint64_t candidate = least | uint64_t{1} << bit;
    int above = 0;
    for (int i = lane; i < n; i += 32) above += key_by_value(acts[i]) >= candidate;
    above = warp_sum(above);
    if (above >= k) least = candidate;
    if (above == k) break;
  }
  float smallest = bits_float(0x7f800000u);
  int kept = 0;
  for (int start = 0; start < n; start += 32) {
    const Act act = start + lane < n ? acts[start + lane] : Act{0.0f, 0};
    const bool keep = start + lane < n && key_by_value(act) >= least;
    const unsigned kept_here = warp_ballot(keep);  // every lane has read its act: slots up to here may be written
    if (keep) {
      acts[kept + __popc(kept_here & ((1u << lane) - 1u))] = act;
      smallest = fminf(smallest, act.value);
    }
    kept += __popc(kept_here);
  }
  for (int step = 16; step > 0; step /= 2) smallest = fminf(smallest, __shfl_xor_sync(0xffffffffu, smallest, step));
  __syncwarp();
  return smallest;
}

struct SelectMemory {
  int32_t histogram[256];
  int32_t bin, above, kept;
};

// A block leaves the k largest of acts[n], n > k, in to[k] as keys by index, in any order: a radix select of eight bits
// at a time, from the highest.
__device__ __forceinline__ void select_largest(const Act* acts, int n, int k, uint64_t* to, SelectMemory& memory) {
  const int thread = threadIdx.x, threads = blockDim.x;
  uint64_t prefix = 0, mask = 0;
  int wanted = k;  // among the keys that begin with `prefix`
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = thread; i < 256; i += threads) memory.histogram[i] = 0;
    __syncthreads();
    for (int i = thread; i < n; i += threads) {
      const uint64_t key = key_by_value(acts[i]);
      if ((key & mask) == prefix) atomicAdd(&memory.histogram[key >> shift & 255], 1);
    }
    __syncthreads();
    if (thread == 0) {
      int bin = 255, above = 0;
      while (above + memory.histogram[bin] < wanted) above += memory.histogram[bin--];
      memory.bin = bin, memory.above = above;
    }
    __syncthreads();
    prefix |= static_cast<uint64_t>(memory.bin) << shift;
    mask |= uint64_t{255} << shift;
    wanted -= memory.above;
    const bool whole = memory.histogram[memory.bin] == wanted;
    __syncthreads();
    if (whole) break;
  }
  if (thread == 0) memory.kept = 0;
  __syncthreads();
  for (int i = thread; i < n; i += threads) {
    if ((key_by_value(acts[i]) & mask) >= prefix) to[atomicAdd(&memory.kept, 1)] = key_by_index(acts[i]);
  }
  __syncthreads();
}

// A block sorts keys[n] in shared memory, ascending; room for the next power of two.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int n) {
  const int thread = threadIdx.x, threads = blockDim.x;
  int size = 1;
  while (size < n) size *= 2;
  for (int i = n + thread; i < size; i += threads) keys[i] = ~uint64_t{0};
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = thread; i < size / 2; i += threads) {
        const int low = i / step * 2 * step + i % step, high = low + step;
        const bool ascending = (low & run) == 0;
        const uint64_t left = keys[low], right = keys[high];
        if ((left > right) == ascending) keys[low] = right, keys[high] = left;
      }
      __syncthreads();
    }
  }
}

}  // namespace deltatc
