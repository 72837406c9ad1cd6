// Number formats bit by bit, for the host and the device alike: tests compile this file with the host's compiler and hold
// it to the reference on every byte. Layout and rounding: ../README.md.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MX_FUNCTION __host__ __device__ __forceinline__
#else
#define MX_FUNCTION inline
#endif

namespace mx {

constexpr int kLeastExponent = -118;  // 2^118 is still a normal number to multiply with

MX_FUNCTION uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

MX_FUNCTION float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

MX_FUNCTION bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// 2^exponent for exponents of normal numbers, -126 .. 127.
MX_FUNCTION float power_of_two(int exponent) { return float_of(uint32_t(exponent + 127) << 23); }

MX_FUNCTION float from_e8m0(uint32_t code) {
  if (code == 255) return float_of(0x7fc00000u);
  return float_of(code == 0 ? 0x00400000u : code << 23);
}

MX_FUNCTION float from_e2m1(uint32_t code) {
  uint32_t size = code & 7u;
  float value = size < 2 ? 0.5f * float(size) : float_of((size << 22) + (126u << 23));
  return code & 8u ? -value : value;
}

// Nearest even, saturating at 6; x must not be NaN. The step between codes is 2^(e - 1) with e the exponent of the value
// or 0: an addend of 1.5 * 2^(22 + e), whose last bit is that step, makes the hardware's addition round.
MX_FUNCTION uint32_t to_e2m1(float x) {
  uint32_t sign = bits_of(x) >> 31;
  float size = float_of(bits_of(x) & 0x7fffffffu);
  size = size < 6.0f ? size : 6.0f;
  uint32_t exponent = bits_of(size > 1.0f ? size : 1.0f) & 0x7f800000u;
  uint32_t steps = bits_of(size + float_of(exponent + (22u << 23) + 0x400000u)) - ((127u + 22u) << 23) - 0x400000u;
  return ((steps + (steps >> 22)) & 7u) | (sign << 3);  // two codes more for each exponent
}

// Nearest even, saturating at 448; NaN and infinities to 0x7F.
MX_FUNCTION uint32_t to_e4m3(float x) {
  if (!is_finite(x)) return 0x7fu;
  uint32_t sign = bits_of(x) >> 31;
  float size = float_of(bits_of(x) & 0x7fffffffu);
  size = size < 448.0f ? size : 448.0f;
  uint32_t bits = bits_of(size);
  uint32_t normal = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
  uint32_t subnormal = bits_of(size + 16384.0f) - 0x46800000u;
  return (size < 0.015625f ? subnormal : normal) | (sign << 7);
}

// E4M3 codes of the eight magnitudes of E2M1 times 2^r, one a byte; r in -40 .. 6. Where all of them are normal numbers
// or 0, they are those of r = -6 with r + 6 added to each exponent.
struct Table {
  uint32_t low, high;
};

MX_FUNCTION Table e4m3_table(int r) {
  if (r >= -5) {
    uint32_t more = uint32_t(r + 6) * 8u;
    return {0x0c080000u + more * 0x01010100u, 0x1c181410u + more * 0x01010101u};
  }
  Table made = {0, 0};
  for (uint32_t code = 0; code < 4; ++code) {
    made.low |= to_e4m3(from_e2m1(code) * power_of_two(r)) << (8 * code);
    made.high |= to_e4m3(from_e2m1(code + 4) * power_of_two(r)) << (8 * code);
  }
  return made;
}

// E8M0 byte of a block whose largest finite magnitude is amax: 2^ceil(log2(amax / 6)), or 2^(floor(log2 amax) - 2).
MX_FUNCTION int block_scale(float amax, bool floor_mode) {
  if (amax == 0.0f) return 0;
  uint32_t bits = bits_of(amax);
  int scale = int(bits >> 23) - 2 + (!floor_mode && (bits & 0x7fffffu) > 0x400000u ? 1 : 0);
  return scale < 0 ? 0 : scale > 254 ? 254 : scale;
}

}  // namespace mx
