// What the kernels need of a GPU, in a few functions. With DELTATC_HOST_SHIM the same kernels are compiled for the CPU
// against tests/cuda_shim/shim.h, which runs a block's threads one at a time and stops at every barrier.
#pragma once

#include <cstdint>

#ifdef DELTATC_HOST_SHIM
#include "shim.h"
#else
#include <cuda_runtime.h>

namespace deltatc {

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// c[16][8] += a[16][16] @ b[16][8] of a warp, bfloat16 into float32. Lane = 4 g + t holds rows g and g + 8, columns
// 2 t and 2 t + 1 (a: also those + 8) of a and c, and column g, rows 2 t, 2 t + 1 and those + 8 of b.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane 8 i + r gives the address of row r of matrix i; lane
// 4 g + t gets of each its row g, columns 2 t and 2 t + 1 (kTransposed: its column g, rows 2 t and 2 t + 1).
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  }
}

// 16 bytes from global to shared memory in the background; zeros where `real` is false.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool real) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(real ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kLeft of this thread's committed groups are under way.
template <int kLeft>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(0xffffffffu, value); }

__device__ __forceinline__ float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

__device__ __forceinline__ unsigned warp_ballot(bool flag) { return __ballot_sync(0xffffffffu, flag); }

// Every block of a cooperative launch, `blocks` of them, has come here; *arrived starts at 0.
__device__ __forceinline__ void grid_barrier(unsigned* arrived, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (*const_cast<volatile unsigned*>(arrived) < blocks) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

template <typename Job>
int launch(void (*kernel)(Job), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream, const Job& job,
           bool cooperative = false) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(function, attribute, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Job*>(&job)};
  return cooperative ? cudaLaunchCooperativeKernel(function, grid, dim3(threads), arguments, shared_bytes, stream)
                     : cudaLaunchKernel(function, grid, dim3(threads), arguments, shared_bytes, stream);
}

inline int clear(void* memory, int64_t bytes, cudaStream_t stream) { return cudaMemsetAsync(memory, 0, bytes, stream); }

inline int multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace deltatc
#endif

namespace deltatc {

struct bf16 {
  uint16_t bits;
};

// Eight of them, loaded and stored together.
struct alignas(16) bf16x8 {
  bf16 values[8];
};

__device__ __forceinline__ float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

__device__ __forceinline__ uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

__device__ __forceinline__ float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// To the nearest, ties to even.
__device__ __forceinline__ bf16 to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(0x7fc0)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

__device__ __forceinline__ bool is_finite(float value) { return (float_bits(value) & 0x7fffffffu) < 0x7f800000u; }

// A negative threshold acts as 0; one that is not a number lets nothing pass.
__device__ __forceinline__ float to_threshold(bf16 value) {
  const float raw = to_float(value);
  return raw < 0.0f ? 0.0f : raw;
}

}  // namespace deltatc
