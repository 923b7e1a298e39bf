// Code that both passes of attention share: tiles of keys and of query rows, and the masks of a tile. Scores are in
// units of log2, as in ../cpu/attention.cpp.
//
// A tile of keys consists of strips. Each strip has 8 neighboring keys and begins 32 keys after the previous strip. One
// Philox call decides one key in each of eight strips. A thread makes one call for a row and a column. The call decides
// the key of that column in every strip. The thread also holds the accumulators that need these results.
//
// A warp computes complete rows, of queries or of keys. It computes one tile of 16 rows, or two tiles that use the same
// loaded keys. The warps of a block work on the rows of both branches and share each tile of keys and values. If both
// branches have the same query, a warp can compute their scores once. While a tile is multiplied, the next one is
// copied to shared memory, with one barrier per tile.
//
// Partial sums of several warps are added in a fixed order, so every run gives bitwise identical results.
#pragma once

#include <cmath>
#include <type_traits>

#include "fragments.cuh"
#include "launch.cuh"
#include "random.cuh"

namespace sgalign::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLeastScale = 0x1p-126f;  // replaces a scale of 0, because 0 times -inf is NaN
constexpr int kRows = 16;                 // rows of a tile
constexpr int kMostShared = 99 << 10;     // bytes of shared memory per block that all supported GPUs have

struct AttentionCall {
    Attention a;
    const uint64_t* seed;
    float* workspace;
    int splits;
    bool aligned;       // all rows begin at multiples of 16 bytes, and their sizes are multiples of 16 bytes
    bool shared_query;  // both groups have the same query; only the backward pass uses this

    // The kernels are compiled twice, for plain calls and for all others. Most calls are plain: they have no explicit
    // mask and no dropout, and all rows can be copied 16 bytes at a time.
    bool plain() const { return aligned && !a.mask && a.dropout_threshold == 0; }
};

__device__ __forceinline__ float infinity() { return as_float(0x7f800000); }

template <class T>
__device__ __forceinline__ T* row_of(const Matrix& m, int64_t b, int64_t h, int64_t row) {
    return (T*)m.data + b * m.batch + h * m.head + row * m.row;
}

// The head of a block, and its position within the head.
struct Head {
    int64_t index, b, h;
    int place;
    __device__ Head(const Attention& a, int places)
        : index(block_index() / places), b(index / a.heads), h(index % a.heads), place(block_index() % places) {}
};

// The rows of one head of a matrix. attention_call() has checked that the row stride in bytes fits in 31 bits, so an
// address takes one multiplication.
template <class T>
struct HeadRows {
    const char* first;
    int bytes;
    __device__ HeadRows(const Matrix& m, const Head& head)
        : first((const char*)row_of<const T>(m, head.b, head.h, 0)), bytes(int(m.row * int64_t(sizeof(T)))) {}
    __device__ Row<T> row(uint32_t row, bool kept) const {
        return {(const T*)(first + int64_t(int(row)) * bytes), kept};
    }
};

// ------------------------------------------------------------------------------------------------------- key tiles

// Tile i starts at first_key(i). Its row 8 * s + c is the c-th key of strip s. The numbers are unsigned, because
// callers also ask for tiles past the last one, whose keys may not fit in a signed int.
template <int kStrips>
struct KeyTiles {
    static constexpr uint32_t kKeys = 8 * kStrips, kSpan = kMaskLanes * kStrips;

    __host__ __device__ static int count(int64_t keys) {
        const int64_t left = divide_up(keys % kSpan, 8);
        return int(keys / kSpan * 4 + (left < 4 ? left : 4));
    }
    __device__ static uint32_t first_key(uint32_t tile) { return tile / 4 * kSpan + tile % 4 * 8; }
    __device__ static uint32_t key(uint32_t tile, uint32_t row) { return first_key(tile) + row + (row & ~7u) * 3; }
    // The number of strips that have any keys.
    __device__ static int strips(uint32_t tile, int64_t keys) {
        const uint32_t count = (uint32_t(keys) - first_key(tile) + kMaskLanes - 1) / kMaskLanes;
        return count < kStrips ? int(count) : kStrips;
    }
};

// Products skip strips without keys. The exception is short rows of 16-bit numbers, where a product costs less than a
// conditional jump.
template <class T, int D>
__device__ __forceinline__ bool is_multiplied(int strip, int strips) {
    return (sizeof(T) == 2 && D <= 64) || strip < strips;
}

// The padded keys of a batch element. Keys past the last one count as padded.
struct PaddedKeys {
    const uint8_t* first;  // null if no keys are padded
    int stride;
    uint32_t keys;
    __device__ PaddedKeys(const Attention& a, const Head& head)
        : first(a.key_padding ? a.key_padding + head.b * a.key_padding_strides[0] : nullptr),
          stride(int(a.key_padding_strides[1])),
          keys(uint32_t(a.keys)) {}
    __device__ bool has(uint32_t key) const { return key >= keys || (first && first[int64_t(int(key)) * stride]); }
};

// The padding of a tile as bits: bit 8 * s + c is set if the c-th key of strip s is padded. A key's padding moves as
// follows:
//   1. Two tiles ahead, a thread loads it from device memory, so nothing waits for the load.
//   2. One tile ahead, before the barrier, the bits are stored in shared memory.
//   3. After the barrier, they are read when the key's tile is copied, and again when it is multiplied.
template <int kStrips>
struct Padding {
    using Keys = KeyTiles<kStrips>;
    using Word = std::conditional_t<(kStrips > 4), uint64_t, uint32_t>;
    static constexpr int kStages = 4, kBytes = kStages * sizeof(Word);
    const PaddedKeys padded;
    Word* words;
    bool answer = false;

    __device__ Padding(const PaddedKeys& padded, void* words) : padded(padded), words((Word*)words) {}
    // Either all or no threads of a warp load, because store() needs a ballot of the whole warp.
    __device__ static bool asks() { return thread_index() < (int(Keys::kKeys) + kWarp - 1) / kWarp * kWarp; }
    __device__ __forceinline__ void ask(uint32_t tile) {
        const uint32_t row = thread_index();
        if (asks()) answer = row < Keys::kKeys && padded.has(Keys::key(tile, row));
    }
    __device__ __forceinline__ void store(uint32_t tile) const {
        if (!asks()) return;
        const uint32_t word = ballot(answer);
        if (lane_index() == 0) shared_store((uint32_t*)(words + tile % kStages) + thread_index() / kWarp, word);
    }
    __device__ __forceinline__ Word of(uint32_t tile) const { return shared_load(words + tile % kStages); }
};

// Start copying a tile of keys or values. Padding becomes zeros, because its memory may contain anything.
template <int kStrips, int kThreads, bool kPlain, class T, int D>
__device__ __forceinline__ void load_keys(Tile<T, D> to, const HeadRows<T>& from, uint32_t tile,
                                          typename Padding<kStrips>::Word padded, const AttentionCall& c) {
    load_tile<8 * kStrips, kThreads>(to, int(c.a.dim), kPlain || c.aligned, [&](uint32_t row) {
        return from.row(KeyTiles<kStrips>::key(tile, row), !(padded >> row & 1));
    });
}

// ------------------------------------------------------------------------------------------ masks of an accumulator
// Element e of strip s of a lane belongs to row + e / 2 * 8 and to the key in column lane % 4 * 2 + e % 2 of the strip.

// Replace each value for which is_dropped(strip, element) is true by `with`.
template <int kStrips, class Dropped>
__device__ __forceinline__ void drop(float (&values)[kStrips][4], float with, Dropped is_dropped) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (is_dropped(s, e)) values[s][e] = with;
}

// Drop the values whose random numbers are below the threshold.
template <int kStrips>
__device__ __forceinline__ void drop_drawn(float (&values)[kStrips][4], float with, const Random& random, uint32_t tile,
                                           uint32_t row, const Head& head) {
    const uint32_t first = KeyTiles<kStrips>::first_key(tile), half = first % kChunk / kMaskLanes / 2;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        uint32_t words[4];  // two strips per word; the lines below move the words of this tile's strips to the front
        const uint32_t column = first % kMaskLanes + lane_index() % 4 * 2 + e % 2;
        random.draw(first / kChunk, column, row + e / 2 * 8, uint32_t(head.index), words);
        if (kStrips <= 4 && half & 2) words[0] = words[2], words[1] = words[3];
        if (kStrips <= 2 && half & 1) words[0] = words[1];
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
            if (is_below(words[s / 2], s % 2, random.limit())) values[s][e] = with;
    }
}

template <int kStrips>
__device__ __forceinline__ void drop_padded(float (&scores)[kStrips][4], float with,
                                            typename Padding<kStrips>::Word padded) {
    if (padded == 0) return;
    padded >>= lane_index() % 4 * 2;
    drop(scores, with, [&](int s, int e) { return padded >> (8 * s + e % 2) & 1; });
}

__device__ __forceinline__ bool is_masked(const Attention& a, const Head& head, int64_t row, int64_t key) {
    return row < a.queries && key < a.keys &&
           a.mask[head.b * a.mask_strides[0] + head.h * a.mask_strides[1] + row * a.mask_strides[2] +
                  key * a.mask_strides[3]];
}

// Drop the values that the explicit mask drops.
template <int kStrips>
__device__ __forceinline__ void drop_masked(float (&scores)[kStrips][4], float with, const AttentionCall& c,
                                            const Head& head, uint32_t tile, int row) {
    drop(scores, with, [&](int s, int e) {
        const uint32_t key = KeyTiles<kStrips>::key(tile, 8 * s + lane_index() % 4 * 2 + e % 2);
        return is_masked(c.a, head, row + e / 2 * 8, key);
    });
}

__device__ __forceinline__ Random mask_random(const AttentionCall& c, uint64_t seed) {
    return {seed, c.a.stream, c.a.mask_threshold};
}
__device__ __forceinline__ Random dropout_random(const AttentionCall& c, uint64_t seed) {
    return {seed, c.a.stream | kDropoutStreamBit, c.a.dropout_threshold};
}

__device__ __forceinline__ float dropout_scale(const Attention& a) {
    return a.dropout_threshold < 65536 ? 65536.0f / float(65536 - a.dropout_threshold) : 0.0f;
}

__device__ __forceinline__ uint64_t load_seed(const AttentionCall& c) { return c.seed ? *c.seed : 0; }

// -------------------------------------------------------------------------------------------------------- row tiles

// A tile of 16 query rows. If there are two query matrices, their tiles alternate, so each block has rows of both.
struct QueryRows {
    int group, first;
    __device__ QueryRows(const Attention& a, int tile)
        : group(tile % a.group_count), first(tile / a.group_count * kRows) {}
    __host__ __device__ static int count(const Attention& a) {
        return int(divide_up(a.queries, kRows)) * a.group_count;
    }
};

// The sum over the four lanes that hold a row.
__device__ __forceinline__ float sum_of_row(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}
__device__ __forceinline__ float largest_of_row(float value) {
    value = fmaxf(value, shuffle_xor(value, 1));
    return fmaxf(value, shuffle_xor(value, 2));
}

// Add the products of rows of `a` with all rows of `b` to `scores`. The rows of `a` are kTiles tiles of 16 rows, from
// row `row`.
template <int kTiles, int kStrips, class T, int D>
__device__ __forceinline__ void multiply_rows(float (&scores)[kTiles][kStrips][4], Tile<T, D> a, int row, Tile<T, D> b,
                                              int strips) {
    // For large D, complete unrolling would spill registers and make compilation slow.
#pragma unroll(D * sizeof(T) > 512 ? 1 : 4)
    for (int column = 0; column < D; column += kDepth<T>) {
        OperandA<T> rows[kTiles];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) rows[t] = load_a(a, row + kRows * t, column);
#pragma unroll
        for (int s = 0; s < kStrips; s += 2)
            if (is_multiplied<T, D>(s, strips)) {
                OperandB<T> keys[2];
                load_b(b, 8 * s, column, keys);
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
                    multiply(scores[t][s], rows[t], keys[0]);
                    multiply(scores[t][s + 1], rows[t], keys[1]);
                }
            }
    }
}

// ------------------------------------------------------------------------------------------------------------- host

inline std::string shape(const Attention& a) {
    std::string text = "B, H, Lq, Lk, D =";
    for (const int64_t size : {a.batch, a.heads, a.queries, a.keys, a.dim}) text += " " + std::to_string(size);
    return text;
}

// Call `function` with the smallest template argument D that holds the channels of a head.
template <class Function>
void with_dim(const Attention& a, Function function) {
    if (a.dim <= 16) return function(std::integral_constant<int, 16>{});
    if (a.dim <= 32) return function(std::integral_constant<int, 32>{});
    if (a.dim <= 64) return function(std::integral_constant<int, 64>{});
    if (a.dim <= 128) return function(std::integral_constant<int, 128>{});
    if (a.dim <= 256) return function(std::integral_constant<int, 256>{});
    throw std::invalid_argument("the CUDA kernels take at most 256 channels per head");
}

// Turn two branches of one query matrix into two query matrices with one branch each.
inline void separate_queries(Attention& a) {
    if (a.groups[0].count < 2) return;
    a.groups[1] = a.groups[0];
    a.groups[1].branches[0] = a.groups[0].branches[1];
    a.groups[0].count = a.groups[1].count = 1;
    a.group_count = 2;
}

inline AttentionCall attention_call(const Attention& a, const uint64_t* seed, int splits, float* workspace,
                                    int element_bytes) {
    for (const int64_t size : {a.queries, a.keys})
        if (size > 0x7fffff00) throw std::invalid_argument("Lq and Lk must be at most 2147483392, got " + shape(a));
    bool aligned = a.dim * element_bytes % 16 == 0;
    const auto check_step = [&](int64_t bytes) {
        if (bytes > 0x7fffffff)
            throw std::invalid_argument("strides of rows and keys must be less than 2 GiB, got a larger one for " +
                                        shape(a));
    };
    check_step(a.key_padding_strides[1]);
    const auto check = [&](const Matrix& m) {
        check_step(m.row * element_bytes);
        aligned = aligned && uintptr_t(m.data) % 16 == 0;
        for (const int64_t stride : {m.batch, m.head, m.row}) aligned = aligned && stride * element_bytes % 16 == 0;
    };
    check(a.key), check(a.value);
    for (int g = 0; g < a.group_count; ++g) {
        check(a.groups[g].query);
        for (int i = 0; i < a.groups[g].count; ++i) check(a.groups[g].branches[i].grad_out);
    }
    return {a, seed, workspace, splits, aligned, false};
}

// attention_forward.cu and attention_backward.cu compile these once for each type.
template <class T>
void forward(const AttentionCall& c, const Queue& queue);
template <class T>
void backward(AttentionCall c, const Queue& queue);

}  // namespace sgalign::cuda
