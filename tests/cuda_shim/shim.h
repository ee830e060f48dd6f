// Runs CUDA kernels on the CPU, for tests: every thread is a fiber, and at every barrier, shuffle or matrix instruction
// another one goes on. DELTATC_SCHEDULE (a number) chooses the order of threads and blocks: 0 is 0, 1, 2, ..., any other
// seeds a random one in which some warps are slow, so that a missing barrier shows up as a wrong result. Background
// copies arrive as late as is allowed, shared memory is a heap block of exactly the size asked for, filled with 0xff
// bytes, and a barrier that some thread never reaches aborts: what hangs or races on a GPU fails here. One launch at a
// time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;
using std::max;
using std::min;

struct dim3 {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};

namespace shim {

constexpr int kProcessors = 5;
constexpr size_t kStack = 256 << 10;

struct Fiber;

// Where `expected` threads wait for each other.
struct Barrier {
  int expected = 0;
  std::vector<Fiber*> waiting;
};

struct Lane {  // what a lane shows its warp
  uint64_t value;
  float* c;
  const uint32_t* a;
  uint32_t b[2];
  const void* row;
  uint32_t* to;
};

struct Warp {
  Barrier barrier;
  Lane lanes[32];
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
};

struct Copy {
  void* to;
  const void* from;
  bool real;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;
  dim3 thread;
  Block* block = nullptr;
  bool done = false;
  std::vector<std::vector<Copy>> copies{{}};
};

// The one grid that is running.
struct Grid {
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* scheduler_fake_stack = nullptr;
  Fiber* now = nullptr;
  std::vector<Fiber*> ready;
  std::function<void()> body;
  dim3 blocks, threads;
  std::mt19937 draw;
  bool shuffled = false;
  uint32_t slow = 0;  // warps that seldom go on while others can
};

inline Grid& grid() {
  static Grid it;
  return it;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s\n", what);
  std::abort();
}

inline void leave() {  // back to the scheduler
  Grid& g = grid();
  Fiber* self = g.now;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self->done ? nullptr : &self->fake_stack, g.scheduler_stack, g.scheduler_stack_size);
#endif
  swapcontext(&self->context, &g.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &g.scheduler_stack, &g.scheduler_stack_size);
#endif
}

inline void release(Barrier& barrier) {
  Grid& g = grid();
  g.ready.insert(g.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

// The last to arrive runs `action`, then all go on.
template <typename Action>
void wait(Barrier& barrier, Action action) {
  Grid& g = grid();
  barrier.waiting.push_back(g.now);
  if (static_cast<int>(barrier.waiting.size()) == barrier.expected) {
    action();
    release(barrier);
  }
  leave();
}

inline void start() {
  Grid& g = grid();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &g.scheduler_stack, &g.scheduler_stack_size);
#endif
  g.body();
  g.now->done = true;
  leave();
  fail("a finished thread went on");
}

inline Warp& warp() {
  Fiber* self = grid().now;
  return self->block->warps[self->thread.x / 32];
}

inline Lane& lane() { return warp().lanes[grid().now->thread.x % 32]; }

// All threads of these blocks, until each is done.
inline void run_blocks(std::vector<Block>& blocks, std::vector<std::unique_ptr<Fiber>>& pool) {
  Grid& g = grid();
  const size_t threads = g.threads.x;
  while (pool.size() < blocks.size() * threads) pool.push_back(std::make_unique<Fiber>());
  g.ready.clear();
  for (size_t i = 0; i < blocks.size() * threads; ++i) {
    Fiber& fiber = *pool[i];
    fiber.thread = dim3(static_cast<unsigned>(i % threads));
    fiber.block = &blocks[i / threads];
    fiber.done = false;
    fiber.copies.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
    g.ready.push_back(&fiber);
  }
  size_t left = blocks.size() * threads;
  std::vector<Fiber*> round;
  while (left > 0) {
    round.swap(g.ready);
    g.ready.clear();
    if (round.empty()) fail("some threads wait at a barrier that the others never reach");
    if (g.shuffled) {
      std::shuffle(round.begin(), round.end(), g.draw);
      const auto goes_on = [&g](Fiber* f) { return !(g.slow >> (f->thread.x / 32) & 1) || g.draw() % 64 == 0; };
      const auto held = std::partition(round.begin(), round.end(), goes_on);
      if (held != round.begin()) {
        g.ready.assign(held, round.end());
        round.erase(held, round.end());
      }
    }
    for (Fiber* fiber : round) {
      g.now = fiber;
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_start_switch_fiber(&g.scheduler_fake_stack, fiber->stack.get(), kStack);
#endif
      swapcontext(&g.scheduler, &fiber->context);
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_finish_switch_fiber(g.scheduler_fake_stack, nullptr, nullptr);
#endif
      if (!fiber->done) continue;
      --left;
      // On a GPU, too, threads that have ended are not waited for.
      Barrier& of_block = fiber->block->barrier;
      Barrier& of_warp = fiber->block->warps[fiber->thread.x / 32].barrier;
      for (Barrier* barrier : {&of_block, &of_warp}) {
        --barrier->expected;
        if (barrier->expected > 0 && static_cast<int>(barrier->waiting.size()) == barrier->expected) release(*barrier);
      }
    }
    round.clear();
  }
}

}  // namespace shim

#define threadIdx (shim::grid().now->thread)
#define blockIdx (shim::grid().now->block->index)
#define blockDim (shim::grid().threads)
#define gridDim (shim::grid().blocks)

inline void __syncthreads() { shim::wait(shim::grid().now->block->barrier, [] {}); }
inline void __syncwarp() { shim::wait(shim::warp().barrier, [] {}); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

template <typename T>
T atomicMax(T* to, T value) {
  const T before = *to;
  *to = max(before, value);
  return before;
}

inline int atomicOr(int* to, int value) {
  const int before = *to;
  *to |= value;
  return before;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) shim::fail("a shuffle of part of a warp");
  std::memcpy(&shim::lane().value, &value, sizeof(T));
  __syncwarp();
  T other;
  std::memcpy(&other, &shim::warp().lanes[(threadIdx.x % 32) ^ with].value, sizeof(T));
  __syncwarp();
  return other;
}

namespace deltatc {

inline char* shared_memory() { return shim::grid().now->block->shared.get(); }

inline float bf16_to_float(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim::Lane& mine = shim::lane();
  mine.c = c, mine.a = a, mine.b[0] = b0, mine.b[1] = b1;
  shim::Warp& warp = shim::warp();
  shim::wait(warp.barrier, [&warp] {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int side = 0; side < 2; ++side) {
        for (int i = 0; i < 4; ++i) {
          A[g + i % 2 * 8][i / 2 * 8 + 2 * t + side] = bf16_to_float(warp.lanes[lane].a[i] >> (16 * side) & 0xffffu);
        }
        for (int i = 0; i < 2; ++i) {
          B[i * 8 + 2 * t + side][g] = bf16_to_float(warp.lanes[lane].b[i] >> (16 * side) & 0xffffu);
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float& to = warp.lanes[row % 8 * 4 + column / 2].c[row / 8 * 2 + column % 2];
        for (int k = 0; k < 16; ++k) to += A[row][k] * B[k][column];
      }
    }
  });
}

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) shim::fail("load_matrices from an address that is no multiple of 16");
  shim::Lane& mine = shim::lane();
  mine.row = row, mine.to = to;
  shim::Warp& warp = shim::warp();
  shim::wait(warp.barrier, [&warp] {
    uint16_t matrices[4][8][8];
    for (int lane = 0; lane < 32; ++lane) std::memcpy(matrices[lane / 8][lane % 8], warp.lanes[lane].row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const uint32_t first = kTransposed ? matrices[i][2 * t][g] : matrices[i][g][2 * t];
        const uint32_t second = kTransposed ? matrices[i][2 * t + 1][g] : matrices[i][g][2 * t + 1];
        warp.lanes[lane].to[i] = first | second << 16;
      }
    }
  });
}

inline void copy_async(void* shared, const void* global, bool real) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(shared) | (real ? reinterpret_cast<uintptr_t>(global) : 0);
  if (addresses % 16 != 0) shim::fail("copy_async at an address that is no multiple of 16");
  shim::grid().now->copies.back().push_back({shared, global, real});
}

inline void copy_commit() { shim::grid().now->copies.emplace_back(); }

template <int kLeft>
void copy_wait() {
  auto& groups = shim::grid().now->copies;  // the last one is still open
  while (static_cast<int>(groups.size()) - 1 > kLeft) {
    for (const shim::Copy& copy : groups.front()) {
      if (copy.real) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

inline int warp_sum(int value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

inline float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

inline unsigned warp_ballot(bool flag) {
  shim::lane().value = flag;
  __syncwarp();
  unsigned out = 0;
  for (int lane = 0; lane < 32; ++lane) out |= static_cast<unsigned>(shim::warp().lanes[lane].value) << lane;
  __syncwarp();
  return out;
}

inline void grid_barrier(unsigned* arrived, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1u);
    while (*arrived < blocks) {
      shim::grid().ready.push_back(shim::grid().now);
      shim::leave();
    }
  }
  __syncthreads();
}

template <typename Job>
int launch(void (*kernel)(Job), dim3 blocks, int threads, int64_t shared_bytes, cudaStream_t, const Job& job,
           bool cooperative = false) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0 || threads < 1 || threads > 1024 || threads % 32 != 0 ||
      blocks.y > 65535 || blocks.z > 65535 || shared_bytes > 160 << 10 || sizeof(Job) > 4096) {
    return 9;  // cudaErrorInvalidConfiguration
  }
  shim::Grid& g = shim::grid();
  const char* schedule = std::getenv("DELTATC_SCHEDULE");
  const unsigned seed = schedule == nullptr ? 0 : static_cast<unsigned>(std::atoi(schedule));
  g.draw.seed(seed);
  g.shuffled = seed != 0;
  g.slow = g.draw();
  g.blocks = blocks;
  g.threads = dim3(static_cast<unsigned>(threads));
  g.body = [kernel, &job] { kernel(job); };
  std::vector<dim3> order;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) order.emplace_back(x, y, z);
  if (g.shuffled) std::shuffle(order.begin(), order.end(), g.draw);
  static std::vector<std::unique_ptr<shim::Fiber>> pool;
  const size_t together = cooperative ? order.size() : 1;
  for (size_t first = 0; first < order.size(); first += together) {
    std::vector<shim::Block> running(together);
    for (size_t i = 0; i < together; ++i) {
      shim::Block& block = running[i];
      block.index = order[first + i];
      block.barrier.expected = threads;
      block.warps.resize(static_cast<size_t>(threads) / 32);
      for (shim::Warp& warp : block.warps) warp.barrier.expected = 32;
      block.shared.reset(new char[static_cast<size_t>(shared_bytes)]);
      std::memset(block.shared.get(), 0xff, static_cast<size_t>(shared_bytes));
    }
    shim::run_blocks(running, pool);
  }
  return 0;
}

inline int clear(void* memory, int64_t bytes, cudaStream_t) {
  std::memset(memory, 0, static_cast<size_t>(bytes));
  return 0;
}

inline int multiprocessors(int* count) {
  *count = shim::kProcessors;
  return 0;
}

}  // namespace deltatc
