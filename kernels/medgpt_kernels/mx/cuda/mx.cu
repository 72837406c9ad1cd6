// Bulk MXFP4 conversions for Hopper: bound by memory, so each thread makes one 16-byte store of neighbouring values.
// Plain C interface; every launcher returns the launch's CUDA error code.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "formats.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// Eight values per thread: 4 bytes in, 16 (bf16) or 32 (fp32) out. Four threads share a scale.
template <bool kBf16>
__global__ void __launch_bounds__(kThreads) unpack_kernel(const uint32_t* __restrict__ blocks,
                                                          const uint8_t* __restrict__ scales, uint4* __restrict__ out,
                                                          int64_t num_words) {
  int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t word = int64_t(blockIdx.x) * kThreads + threadIdx.x; word < num_words; word += stride) {
    uint32_t packed = __ldg(blocks + word);
    float scale = mx::from_e8m0(__ldg(scales + (word >> 2)));
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = mx::from_e2m1((packed >> (4 * i)) & 15u) * scale;
    if (kBf16) {
      out[word] = make_uint4(pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3]),
                             pack_bf16(value[4], value[5]), pack_bf16(value[6], value[7]));
    } else {
      out[2 * word] = make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]), __float_as_uint(value[2]),
                                 __float_as_uint(value[3]));
      out[2 * word + 1] = make_uint4(__float_as_uint(value[4]), __float_as_uint(value[5]), __float_as_uint(value[6]),
                                     __float_as_uint(value[7]));
    }
  }
}

// Eight bf16 values per thread, a block of 32 in four neighbouring lanes. num_words is a multiple of 4, so the lanes of a
// block are either all inside or all outside.
__global__ void __launch_bounds__(kThreads) pack_kernel(const uint4* __restrict__ w, uint32_t* __restrict__ blocks,
                                                        uint8_t* __restrict__ scales, int64_t num_words,
                                                        bool floor_mode) {
  int64_t word = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  bool inside = word < num_words;
  uint4 raw = inside ? __ldg(w + word) : make_uint4(0, 0, 0, 0);
  const uint32_t parts[4] = {raw.x, raw.y, raw.z, raw.w};
  float value[8], amax = 0.0f;
  int not_finite = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    value[i] = mx::float_of(i & 1 ? parts[i >> 1] & 0xffff0000u : parts[i >> 1] << 16);
    bool finite = mx::is_finite(value[i]);
    not_finite |= !finite;
    amax = finite ? fmaxf(amax, fabsf(value[i])) : amax;
  }
#pragma unroll
  for (int lane = 1; lane < 4; lane *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, lane));
    not_finite |= __shfl_xor_sync(0xffffffffu, not_finite, lane);
  }
  if (!inside) return;
  int scale = mx::block_scale(amax, floor_mode);
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float scaled = not_finite ? 0.0f : mx::divide_by_scale(value[i], scale);
    packed |= mx::to_e2m1(scaled) << (4 * i);
  }
  blocks[word] = packed;
  if ((word & 3) == 0) scales[word >> 2] = uint8_t(not_finite ? 255 : scale);
}

// One block of threads per 128x128 tile: the largest exponent of its groups, then every value exactly; the transposed
// copy goes through shared memory. Each thread holds two of the tile's 512 groups of 32.
__global__ void __launch_bounds__(kThreads) to_e4m3_kernel(const uint4* __restrict__ blocks,
                                                           const uint8_t* __restrict__ scales,
                                                           uint8_t* __restrict__ codes,
                                                           uint8_t* __restrict__ transposed,
                                                           float* __restrict__ tile_scales, int8_t* __restrict__ fits,
                                                           int rows, int columns) {
  __shared__ int largest_shared, least_shared;
  __shared__ __align__(16) uint8_t tile[kTile][kTile + 4];
  const int groups_per_row = columns / 32;
  const int64_t matrix = blockIdx.z;
  if (threadIdx.x == 0) largest_shared = -1, least_shared = 255;
  __syncthreads();

  uint4 packed[2];
  int scale[2];
  bool inside[2];
  int largest = -1, least = 255;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int group = threadIdx.x + i * kThreads;
    int row = blockIdx.y * kTile + group / 4, column_group = blockIdx.x * 4 + group % 4;
    inside[i] = row < rows && column_group < groups_per_row;
    int64_t at = (matrix * rows + row) * groups_per_row + column_group;
    packed[i] = inside[i] ? __ldg(blocks + at) : make_uint4(0, 0, 0, 0);
    scale[i] = inside[i] ? scales[at] : 0;
    bool nonzero = ((packed[i].x | packed[i].y | packed[i].z | packed[i].w) & 0x77777777u) != 0;
    if (nonzero && scale[i] != 255) largest = max(largest, scale[i]), least = min(least, scale[i]);
  }
  largest = __reduce_max_sync(0xffffffffu, largest);
  least = __reduce_min_sync(0xffffffffu, least);
  if (threadIdx.x % 32 == 0) atomicMax(&largest_shared, largest), atomicMin(&least_shared, least);
  __syncthreads();

  const int exponent = largest_shared < 0 ? 0 : max(largest_shared - 133, mx::kLeastExponent);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int group = threadIdx.x + i * kThreads, row = group / 4;
    float factor = scale[i] == 255 ? mx::float_of(0x7fc00000u)
                                   : mx::power_of_two(min(max(scale[i] - 127 - exponent, -40), 6));
    const uint32_t words[4] = {packed[i].x, packed[i].y, packed[i].z, packed[i].w};
    uint32_t out[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      out[j] = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t code = (words[j / 2] >> (16 * (j % 2) + 4 * k)) & 15u;
        out[j] |= mx::to_e4m3(mx::from_e2m1(code) * factor) << (8 * k);
      }
    }
    if (inside[i]) {
      int64_t place = (matrix * rows + blockIdx.y * kTile + row) * columns + blockIdx.x * kTile + (group % 4) * 32;
      uint4* to = reinterpret_cast<uint4*>(codes + place);
      to[0] = make_uint4(out[0], out[1], out[2], out[3]);
      to[1] = make_uint4(out[4], out[5], out[6], out[7]);
    }
    if (transposed != nullptr) {
#pragma unroll
      for (int j = 0; j < 8; ++j) *reinterpret_cast<uint32_t*>(&tile[row][(group % 4) * 32 + 4 * j]) = out[j];
    }
  }
  if (threadIdx.x == 0) {
    int64_t at = (matrix * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    tile_scales[at] = mx::power_of_two(exponent);
    fits[at] = largest_shared < 0 || least_shared - 127 - exponent >= -8;
  }
  if (transposed == nullptr) return;
  __syncthreads();
  for (int at = threadIdx.x; at < kTile * kTile; at += kThreads) {
    int column = at / kTile, row = at % kTile;
    int to_row = blockIdx.x * kTile + column, to_column = blockIdx.y * kTile + row;
    if (to_row < columns && to_column < rows) transposed[(matrix * columns + to_row) * rows + to_column] = tile[row][column];
  }
}

int blocks_for(int64_t work) {
  int64_t wanted = (work + kThreads - 1) / kThreads;
  return int(wanted < 132 * 64 ? wanted : 132 * 64);  // enough for every multiprocessor of an H200, then a loop
}

}  // namespace

extern "C" {

int medgpt_mx_unpack(const void* blocks, const void* scales, void* out, int64_t num_groups, int is_bf16,
                     cudaStream_t stream) {
  int64_t words = num_groups * 4;
  if (words == 0) return 0;
  auto* from = static_cast<const uint32_t*>(blocks);
  auto* scale = static_cast<const uint8_t*>(scales);
  auto* to = static_cast<uint4*>(out);
  if (is_bf16)
    unpack_kernel<true><<<blocks_for(words), kThreads, 0, stream>>>(from, scale, to, words);
  else
    unpack_kernel<false><<<blocks_for(words), kThreads, 0, stream>>>(from, scale, to, words);
  return int(cudaGetLastError());
}

int medgpt_mx_pack_bf16(const void* w, void* blocks, void* scales, int64_t num_groups, int floor_mode,
                        cudaStream_t stream) {
  int64_t words = num_groups * 4;
  if (words == 0) return 0;
  pack_kernel<<<unsigned((words + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      static_cast<const uint4*>(w), static_cast<uint32_t*>(blocks), static_cast<uint8_t*>(scales), words,
      floor_mode != 0);
  return int(cudaGetLastError());
}

// transposed may be null.
int medgpt_mx_to_e4m3(const void* blocks, const void* scales, void* codes, void* transposed, void* tile_scales,
                      void* fits, int matrices, int rows, int columns, cudaStream_t stream) {
  dim3 grid((columns + kTile - 1) / kTile, (rows + kTile - 1) / kTile, matrices);
  to_e4m3_kernel<<<grid, kThreads, 0, stream>>>(
      static_cast<const uint4*>(blocks), static_cast<const uint8_t*>(scales), static_cast<uint8_t*>(codes),
      static_cast<uint8_t*>(transposed), static_cast<float*>(tile_scales), static_cast<int8_t*>(fits), rows, columns);
  return int(cudaGetLastError());
}

}  // extern "C"
