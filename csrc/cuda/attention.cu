// The entry points of attention, and the kernel that writes a random mask without attention.
#include "attention.cuh"

#include <algorithm>

namespace sgalign::cuda {

namespace {

struct RandomMaskCall {
    RandomMask m;
    const uint64_t* seed;
};

constexpr int kMaskThreads = 256;

// Each thread decides the eight keys of one lane of a chunk.
__global__ void __launch_bounds__(kMaskThreads) random_mask_kernel(const __grid_constant__ RandomMaskCall c) {
    const int64_t chunks = divide_up(c.m.keys, kChunk);
    const int64_t i = int64_t(block_index()) * kMaskThreads + thread_index();
    const int64_t row = i / kMaskLanes / chunks;
    if (row >= c.m.batch_heads * c.m.queries) return;
    const int64_t chunk = i / kMaskLanes % chunks, lane = i % kMaskLanes, first = chunk * kChunk + lane;
    const Random random{*c.seed, c.m.stream, c.m.threshold};
    uint32_t words[4];
    random.draw(uint32_t(chunk), uint32_t(lane), uint32_t(row % c.m.queries), uint32_t(row / c.m.queries), words);
#pragma unroll
    for (int group = 0; group < kMaskGroups; ++group)
        if (first + kMaskLanes * group < c.m.keys)
            c.m.out[row * c.m.keys + first + kMaskLanes * group] =
                c.m.threshold > 0 && is_below(words[group / 2], group % 2, random.limit());
}

}  // namespace

void random_mask(const RandomMask& m, const uint64_t* seed, const Queue& queue) {
    const int64_t threads = m.batch_heads * m.queries * divide_up(m.keys, kChunk) * kMaskLanes;
    launch("sgalign's random mask of " + std::to_string(m.batch_heads) + " x " + std::to_string(m.queries) + " x " +
               std::to_string(m.keys),
           random_mask_kernel, divide_up(threads, kMaskThreads), 1, kMaskThreads, 0, queue, RandomMaskCall{m, seed});
}

// Split the keys if the blocks fill at most half of the multiprocessors. Each part has at least four tiles. The count
// assumes eight tiles of rows per block, as in the fastest kernels.
int attention_splits(const Attention& a, int multiprocessors) {
    const int64_t blocks = a.batch * a.heads * divide_up(QueryRows::count(a), 8);
    if (blocks == 0) return 1;
    const int64_t splits = std::min<int64_t>(multiprocessors / blocks, KeyTiles<kMaskGroups>::count(a.keys) / 4);
    return int(std::clamp<int64_t>(splits, 1, 32));
}

void attention_forward(const Attention& a, const uint64_t* seed, int splits, float* workspace, const Queue& queue) {
    with_type(a.dtype, [&](auto zero) {
        forward<decltype(zero)>(attention_call(a, seed, splits, workspace, sizeof zero), queue);
    });
}

void attention_backward(const Attention& a, const uint64_t* seed, int splits, float* workspace, const Queue& queue) {
    with_type(a.dtype, [&](auto zero) {
        backward<decltype(zero)>(attention_call(a, seed, splits, workspace, sizeof zero), queue);
    });
}

}  // namespace sgalign::cuda
