// What mx.cu asks of CUDA, for a host compiler: threads of a block run as threads of the host, blocks one after the other.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static
#define __restrict__
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;
using cudaStream_t = void*;

struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int cudaGetLastError() { return 0; }

struct Block {
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<uint32_t> lanes;
  std::mutex atomics;
  explicit Block(int threads) : all(threads), lanes(threads) {
    for (int warp = 0; warp < threads / 32; ++warp) warps.push_back(std::make_unique<std::barrier<>>(32));
  }
};
inline thread_local dim3 threadIdx, blockIdx, gridDim;
inline thread_local Block* block;

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, int threads, Arguments... arguments) {
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        Block here(threads);
        std::vector<std::thread> running;
        for (int thread = 0; thread < threads; ++thread)
          running.emplace_back([=, &here] {
            threadIdx = dim3(thread), blockIdx = dim3(x, y, z), gridDim = grid, block = &here;
            kernel(arguments...);
            here.all.arrive_and_drop();
            here.warps[thread / 32]->arrive_and_drop();
          });
        for (auto& thread : running) thread.join();
      }
}

inline void __syncthreads() { block->all.arrive_and_wait(); }

// What every lane of a warp gives, made of by each.
template <class Make>
uint32_t over_the_warp(uint32_t mine, Make make) {
  unsigned warp = threadIdx.x / 32;
  block->lanes[threadIdx.x] = mine;
  block->warps[warp]->arrive_and_wait();
  uint32_t made = make(&block->lanes[warp * 32]);
  block->warps[warp]->arrive_and_wait();
  return made;
}
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int lanes) {
  return over_the_warp(value, [=](uint32_t* all) { return all[threadIdx.x % 32 ^ lanes]; });
}
inline int __reduce_max_sync(uint32_t, int value) {
  return over_the_warp(value, [](uint32_t* all) { return *std::max_element((int*)all, (int*)all + 32); });
}
inline int __reduce_min_sync(uint32_t, int value) {
  return over_the_warp(value, [](uint32_t* all) { return *std::min_element((int*)all, (int*)all + 32); });
}
inline void atomicMax(int* place, int value) {
  std::lock_guard<std::mutex> lock(block->atomics);
  *place = max(*place, value);
}
inline void atomicMin(int* place, int value) {
  std::lock_guard<std::mutex> lock(block->atomics);
  *place = min(*place, value);
}

template <class T>
T __ldg(const T* place) {
  return *place;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i) made |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return made;
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
  return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16;
}

struct __nv_bfloat162 {
  uint16_t x, y;
};
inline float wide(uint16_t bits) {
  uint32_t all = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &all, 4);
  return value;
}
inline uint16_t narrow(float value) {  // nearest even; what is computed with it is exact in fp32
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {narrow(wide(a.x) * wide(b.x)), narrow(wide(a.y) * wide(b.y))};
}
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {narrow(wide(a.x) + wide(b.x)), narrow(wide(a.y) + wide(b.y))};
}
inline __nv_bfloat162 __hmin2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {narrow(fminf(wide(a.x), wide(b.x))), narrow(fminf(wide(a.y), wide(b.y)))};
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {narrow(fmaxf(wide(a.x), wide(b.x))), narrow(fmaxf(wide(a.y), wide(b.y)))};
}
