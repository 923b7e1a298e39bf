// The random numbers of the mask, which ../philox.h defines.
#pragma once

#include "../philox.h"
#include "primitives.cuh"

namespace sgalign::cuda {

struct Random {
    uint64_t seed;
    uint32_t stream;
    int threshold;

    // The largest word whose upper half is below the threshold. The upper half of a word is below the threshold if and
    // only if the word is at most this limit. The lower half does not matter. A threshold of 65536 wraps to all ones.
    // This must not be called for a threshold of 0.
    __device__ __forceinline__ uint32_t limit() const { return (uint32_t(threshold) << 16) - 1; }

    // Draw the numbers for the eight keys that one lane of a chunk decides. Word i has group 2 * i in its lower half
    // and group 2 * i + 1 in its upper half.
    __device__ __forceinline__ void draw(uint32_t chunk, uint32_t lane, uint32_t row, uint32_t batch_head,
                                         uint32_t (&words)[4]) const {
        uint32_t c0 = kMaskLanes * chunk + lane, c1 = row, c2 = batch_head, c3 = stream;
        uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
        for (int round = 0; round < kPhiloxRounds; ++round) {
            const uint64_t product0 = multiply_wide(kPhiloxMultiplier0, c0);
            const uint64_t product1 = multiply_wide(kPhiloxMultiplier1, c2);
            c0 = uint32_t(product1 >> 32) ^ c1 ^ key0, c1 = uint32_t(product1);
            c2 = uint32_t(product0 >> 32) ^ c3 ^ key1, c3 = uint32_t(product0);
            key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1;
        }
        words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
    }
};

// Return whether the number of an even or odd group, in a word from Random::draw(), is below the threshold.
__device__ __forceinline__ bool is_below(uint32_t word, bool odd, uint32_t limit) {
    return (odd ? word : word << 16) <= limit;
}

}  // namespace sgalign::cuda
