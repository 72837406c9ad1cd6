// Bulk MXFP4 conversions for Hopper: bound by memory, so each thread makes one 16-byte store of neighbouring values.
// Plain C interface; every launcher returns the launch's CUDA error code.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "formats.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;

// The two values of a byte as bf16, times 2^-126: the three bits of a magnitude are the last of bf16's exponent and the
// first of its mantissa, also where they mean a subnormal number.
__device__ __forceinline__ uint32_t spread(uint32_t byte) {
  return ((byte * 0x00040040u) & 0x01c001c0u) | ((byte * 0x01001000u) & 0x80008000u);
}

__device__ __forceinline__ __nv_bfloat162 pair_of(uint32_t bits) {
  __nv_bfloat162 pair;
  memcpy(&pair, &bits, 4);
  return pair;
}

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 pair) {
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

__device__ __forceinline__ uint32_t times(uint32_t pair, uint32_t factor) {
  return bits_of(__hmul2(pair_of(pair), pair_of(factor)));
}

// mx::to_e2m1 of two bf16 values times a power of two, in the lowest bits of each half. 1.5 * 2^(6 + e) is the addend whose
// last bit, in bf16, is the step between codes.
__device__ __forceinline__ uint32_t to_e2m1_pair(uint32_t pair, uint32_t factor) {
  __nv_bfloat162 size = __hmin2(pair_of(times(pair, factor) & 0x7fff7fffu), pair_of(0x40c040c0u));  // 6
  uint32_t exponent = bits_of(__hmax2(size, pair_of(0x3f803f80u))) & 0x7f807f80u;
  constexpr uint32_t kSixMore = (6u << 7 | 0x40u) * 0x10001u, kOne = (127u << 7) * 0x10001u;
  uint32_t steps = bits_of(__hadd2(size, pair_of(exponent + kSixMore))) - kSixMore - kOne;
  return ((steps + (steps >> 6)) & 0x00070007u) | ((pair >> 12) & 0x00080008u);
}

// Eight values per thread: 4 bytes in, 16 (bf16) or 32 (fp32) out. Four threads share a scale. Instructions count: at four
// for a value there is as much time for them as for the memory.
template <bool kBf16>
__global__ void __launch_bounds__(kThreads) unpack_kernel(const uint32_t* __restrict__ blocks,
                                                          const uint8_t* __restrict__ scales, uint4* __restrict__ out,
                                                          int64_t num_words) {
  constexpr uint32_t kUp = 0x7e807e80u;  // 2^126, twice
  int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t word = int64_t(blockIdx.x) * kThreads + threadIdx.x; word < num_words; word += stride) {
    uint32_t packed = __ldg(blocks + word), code = __ldg(scales + (word >> 2)), pair[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = times(spread((packed >> (8 * i)) & 255u), kUp);
    if (kBf16) {
      uint32_t scale = mx::bits_of(mx::from_e8m0(code)) >> 16;
      scale |= scale << 16;
      out[word] = make_uint4(times(pair[0], scale), times(pair[1], scale), times(pair[2], scale), times(pair[3], scale));
    } else {
      float scale = mx::from_e8m0(code);
      uint32_t wide[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        wide[2 * i] = mx::bits_of(mx::float_of(pair[i] << 16) * scale);
        wide[2 * i + 1] = mx::bits_of(mx::float_of(pair[i] & 0xffff0000u) * scale);
      }
      out[2 * word] = make_uint4(wide[0], wide[1], wide[2], wide[3]);
      out[2 * word + 1] = make_uint4(wide[4], wide[5], wide[6], wide[7]);
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
  uint32_t both = 0;  // the largest magnitude of the even and of the odd values, as the integers that bf16's bits are
#pragma unroll
  for (int i = 0; i < 4; ++i) both = __vmaxu2(both, parts[i] & 0x7fff7fffu);
  uint32_t amax = max(both & 0xffffu, both >> 16);
#pragma unroll
  for (int lane = 1; lane < 4; lane *= 2) amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, lane));
  if (!inside) return;
  bool finite = amax < 0x7f80u;
  int scale = finite ? mx::block_scale(mx::float_of(amax << 16), floor_mode) : 255;
  uint32_t inverse = uint32_t(finite ? 254 - scale : 127) * 0x00800080u;  // 2^-126 .. 2^127, twice
  uint32_t codes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) codes[i] = to_e2m1_pair(parts[i], inverse);
  uint32_t first = __byte_perm(codes[0], codes[1], 0x6420), second = __byte_perm(codes[2], codes[3], 0x6420);
  uint32_t packed = __byte_perm(first | first >> 4, second | second >> 4, 0x6420);
  blocks[word] = finite ? packed : 0;
  if ((word & 3) == 0) scales[word >> 2] = uint8_t(scale);
}

// One block of threads per 128x128 tile: the largest exponent of its groups, then every value exactly, four at a time from
// a table of its group's eight magnitudes; the transposed copy goes through shared memory. Each thread holds two of the
// tile's 512 groups of 32. What is not wanted, codes or transposed, is null.
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
    bool is_nan = scale[i] == 255;
    mx::Table table = mx::e4m3_table(min(max(scale[i] - 127 - exponent, -40), 6));
    if (is_nan) table = {0x7f7f7f7fu, 0x7f7f7f7fu};
    const uint32_t signs = is_nan ? 0u : 0x8000u;  // its second byte is a sign, its first none
    const uint32_t words[4] = {packed[i].x, packed[i].y, packed[i].z, packed[i].w};
    uint32_t out[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t four = words[j / 2] >> (16 * (j % 2));
      out[j] = __byte_perm(table.low, table.high, four & 0x7777u) | __byte_perm(signs, 0, (four >> 3) & 0x1111u);
    }
    if (codes != nullptr && inside[i]) {
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
  if (rows % 4 == 0) {  // four rows of four columns a thread, and words of 4 bytes
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) {
      int row = threadIdx.x % 32 * 4, column = (threadIdx.x / 32 + 8 * turn) * 4;
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = *reinterpret_cast<const uint32_t*>(&tile[row + i][column]);
      uint32_t top[2] = {__byte_perm(word[0], word[1], 0x5140), __byte_perm(word[0], word[1], 0x7362)};
      uint32_t bottom[2] = {__byte_perm(word[2], word[3], 0x5140), __byte_perm(word[2], word[3], 0x7362)};
      int to_column = blockIdx.y * kTile + row;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int to_row = blockIdx.x * kTile + column + i;
        uint32_t four = __byte_perm(top[i / 2], bottom[i / 2], i % 2 ? 0x7632 : 0x5410);
        if (to_row < columns && to_column < rows)
          *reinterpret_cast<uint32_t*>(transposed + (matrix * columns + to_row) * rows + to_column) = four;
      }
    }
    return;
  }
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

// codes or transposed may be null.
int medgpt_mx_to_e4m3(const void* blocks, const void* scales, void* codes, void* transposed, void* tile_scales,
                      void* fits, int matrices, int rows, int columns, cudaStream_t stream) {
  dim3 grid((columns + kTile - 1) / kTile, (rows + kTile - 1) / kTile, matrices);
  to_e4m3_kernel<<<grid, kThreads, 0, stream>>>(
      static_cast<const uint4*>(blocks), static_cast<const uint8_t*>(scales), static_cast<uint8_t*>(codes),
      static_cast<uint8_t*>(transposed), static_cast<float*>(tile_scales), static_cast<int8_t*>(fits), rows, columns);
  return int(cudaGetLastError());
}

}  // extern "C"
