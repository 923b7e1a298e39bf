// The definition of the random mask, which all kernels share. sgalign/ops/reference.py has it in PyTorch.
//
// Key k lies in lane k % 32 of group k % 256 / 32 of chunk k / 256. One Philox call per (chunk, lane) gives eight
// 16-bit numbers, one per group. A key is dropped if its number is below the threshold. A kernel stores the result for
// a chunk as 32 lanes of 8 bits: bit g of lane i belongs to key 32 * g + i of the chunk.
#pragma once

#include <cstdint>

namespace sgalign {

constexpr int kMaskLanes = 32;
constexpr int kMaskGroups = 8;
constexpr int kChunk = kMaskLanes * kMaskGroups;
constexpr uint32_t kDropoutStreamBit = 1u << 31;

// Philox4x32 with 7 rounds (Salmon et al., SC 2011).
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;

}  // namespace sgalign
