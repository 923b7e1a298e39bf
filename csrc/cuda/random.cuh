// The random mask's bits; ../philox.h has the definition.
#pragma once

#include "../philox.h"
#include "primitives.cuh"

namespace sgalign::cuda {

struct Random {
    uint64_t seed;
    uint32_t stream;
    int threshold;

    // Bit g: key 32 * g + lane of the chunk is dropped.
    __device__ __forceinline__ uint32_t dropped(int chunk, int lane, int row, uint32_t batch_head) const {
        uint32_t c0 = uint32_t(kMaskLanes * chunk + lane), c1 = uint32_t(row), c2 = batch_head, c3 = stream;
        uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
        for (int round = 0; round < kPhiloxRounds; ++round) {
            const uint32_t high0 = multiply_high(kPhiloxMultiplier0, c0), low0 = kPhiloxMultiplier0 * c0;
            const uint32_t high1 = multiply_high(kPhiloxMultiplier1, c2), low1 = kPhiloxMultiplier1 * c2;
            c0 = high1 ^ c1 ^ key0, c1 = low1;
            c2 = high0 ^ c3 ^ key1, c3 = low0;
            key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1;
        }
        const uint32_t words[4] = {c0, c1, c2, c3};
        uint32_t bits = 0;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            bits |= uint32_t(int(words[word] & 0xffff) < threshold) << 2 * word;
            bits |= uint32_t(int(words[word] >> 16) < threshold) << (2 * word + 1);
        }
        return bits;
    }
};

}  // namespace sgalign::cuda
