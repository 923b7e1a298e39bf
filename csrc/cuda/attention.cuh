// What the forward and the backward of attention share: tiles of keys and of query rows, and the masks of a tile.
// Scores are kept in units of log2, as ../cpu/attention.cpp does.
//
// A tile of keys is made of strips of 8 neighbouring keys, 32 keys apart from strip to strip: eight strips are what the
// Philox calls of 8 lanes decide, so a thread that calls it once for a row and a column decides that column's key in
// each strip, and has the results where its accumulators are.
//
// A warp computes 16 rows of one query, or of one key, whole. Warps of a block work on the rows of both branches, and
// share each tile of keys and values; where both branches have the same query, a warp computes their scores once. Tiles
// are copied to shared memory while the ones before are multiplied, with one barrier a tile.
//
// Nothing is added up by more than one warp but in a fixed order, so results are the same bits on each run.
#pragma once

#include <cmath>
#include <type_traits>

#include "fragments.cuh"
#include "launch.cuh"
#include "random.cuh"

namespace sgalign::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kRows = 16;  // of a warp

struct AttentionCall {
    Attention a;
    const uint64_t* seed;
    float* workspace;
    int splits;
    bool aligned;       // all rows can be copied 16 bytes at a time
    bool shared_query;  // in the backward: the groups have the same query
};

__device__ __forceinline__ float infinity() { return as_float(0x7f800000); }

template <class T>
__device__ __forceinline__ T* row_of(const Matrix& m, int64_t b, int64_t h, int64_t row) {
    return (T*)m.data + b * m.batch + h * m.head + row * m.row;
}

// Where a block is in the grid: its head, and its place within the head.
struct Head {
    int64_t index, b, h;
    int place;
    __device__ Head(const Attention& a, int places)
        : index(block_index() / places), b(index / a.heads), h(index % a.heads), place(block_index() % places) {}
};

// ------------------------------------------------------------------------------------------------------- key tiles

// Tile i starts at key(i); row 8 * s + c of it is the c-th key of strip s.
template <int kStrips>
struct KeyTiles {
    static constexpr int kKeys = 8 * kStrips, kSpan = kMaskLanes * kStrips;

    __host__ __device__ static int count(int64_t keys) {
        const int64_t left = divide_up(keys % kSpan, 8);
        return int(keys / kSpan * 4 + (left < 4 ? left : 4));
    }
    __device__ static int first_key(int tile) { return tile / 4 * kSpan + tile % 4 * 8; }
    __device__ static int key(int tile, int row) { return first_key(tile) + row / 8 * kMaskLanes + row % 8; }
    // How many strips have keys at all.
    __device__ static int strips(int tile, int64_t keys) {
        const int64_t count = divide_up(keys - first_key(tile), kMaskLanes);
        return count < kStrips ? int(count) : kStrips;
    }
};

__device__ __forceinline__ bool is_padded(const Attention& a, int64_t b, int key) {
    return a.key_padding && a.key_padding[b * a.key_padding_strides[0] + key * a.key_padding_strides[1]];
}

__device__ __forceinline__ bool is_masked(const Attention& a, const Head& head, int row, int key) {
    return a.mask[head.b * a.mask_strides[0] + head.h * a.mask_strides[1] + row * a.mask_strides[2] +
                  key * a.mask_strides[3]];
}

// Starts to copy a tile of keys or values; padded ones become zeros, whatever they hold.
template <int kStrips, int kThreads, class T, int D>
__device__ __forceinline__ void load_keys(Tile<T, D> to, const Matrix& from, int tile, const AttentionCall& c,
                                          const Head& head) {
    load_tile<8 * kStrips, kThreads>(to, int(c.a.dim), c.aligned, [&](int row) {
        const int key = KeyTiles<kStrips>::key(tile, row);
        const bool inside = key < c.a.keys;
        return Row<T>{row_of<const T>(from, head.b, head.h, inside ? key : 0), inside && !is_padded(c.a, head.b, key)};
    });
}

// Bit 8 * s + c of `words`, in shared memory: the key is padded, or there is none.
template <int kStrips>
__device__ __forceinline__ void store_padding(uint32_t* words, int tile, const AttentionCall& c, const Head& head) {
    const int row = thread_index();
    if (row / kWarp * kWarp >= 8 * kStrips) return;
    const int key = KeyTiles<kStrips>::key(tile, row);
    const uint32_t word = ballot(row >= 8 * kStrips || key >= c.a.keys || is_padded(c.a, head.b, key));
    if (row % kWarp == 0) shared_store(words + row / kWarp, word);
}

// ------------------------------------------------------------------------------------------ masks of an accumulator

// Bit 8 * e + s is about element e of strip s of this lane.
struct Masks {
    uint32_t shared, random, dropout;  // padding and explicit mask; random mask; dropout
};

template <int kStrips>
__device__ __forceinline__ uint32_t random_bits(const Random& random, int tile, int row, uint32_t batch_head) {
    const int first = KeyTiles<kStrips>::first_key(tile);
    const int chunk = first / kChunk, strip = first % kChunk / kMaskLanes, column = first % kMaskLanes;
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e)
        bits |=
            random.dropped(chunk, column + lane_index() % 4 * 2 + e % 2, row + e / 2 * 8, batch_head) >> strip << 8 * e;
    return bits;
}

// `row` is that of this lane's elements 0 and 1. `any_random`: whether a branch wants the random mask.
template <int kStrips>
__device__ __forceinline__ Masks tile_masks(const AttentionCall& c, const Head& head, uint64_t seed,
                                            const uint32_t* padding, int tile, int row, bool any_random) {
    const Attention& a = c.a;
    const int column = lane_index() % 4 * 2;
    uint32_t even = 0, odd = 0;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
        const uint32_t two = shared_load(padding + s / 4) >> (s % 4 * 8 + column);
        even |= (two & 1) << s, odd |= (two >> 1 & 1) << s;
    }
    Masks masks{(even | odd << 8) * 0x10001, 0, 0};
    if (a.mask) {
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int key = KeyTiles<kStrips>::key(tile, 8 * s + column + e % 2), at = row + e / 2 * 8;
                if (key < a.keys && at < a.queries && is_masked(a, head, at, key)) masks.shared |= 1u << (8 * e + s);
            }
    }
    if (any_random)
        masks.random = random_bits<kStrips>({seed, a.stream, a.mask_threshold}, tile, row, uint32_t(head.index));
    if (a.dropout_threshold > 0)
        masks.dropout = random_bits<kStrips>({seed, a.stream | kDropoutStreamBit, a.dropout_threshold}, tile, row,
                                             uint32_t(head.index));
    return masks;
}

__device__ __forceinline__ bool bit(uint32_t bits, int element, int strip) { return bits >> (8 * element + strip) & 1; }

__device__ __forceinline__ float dropout_scale(const Attention& a) {
    return a.dropout_threshold < 65536 ? 65536.0f / float(65536 - a.dropout_threshold) : 0.0f;
}

__device__ __forceinline__ uint64_t load_seed(const AttentionCall& c) { return c.seed ? *c.seed : 0; }

// -------------------------------------------------------------------------------------------------------- row tiles

// The 16 query rows of a warp; those of two queries alternate, so that a block has both.
struct QueryRows {
    int group, first;
    __device__ QueryRows(const Attention& a, int tile)
        : group(tile % a.group_count), first(tile / a.group_count * kRows) {}
    __host__ __device__ static int count(const Attention& a) {
        return int(divide_up(a.queries, kRows)) * a.group_count;
    }
};

template <int kWarps, class T, int D, class Rows>
__device__ __forceinline__ void load_rows(Tile<T, D> to, int first_tile, const AttentionCall& c, const Head& head,
                                          Rows matrix_of) {
    load_tile<kRows * kWarps, kWarp * kWarps>(to, int(c.a.dim), c.aligned, [&](int row) {
        const QueryRows rows(c.a, first_tile + row / kRows);
        const int at = rows.first + row % kRows;
        const bool inside = at < c.a.queries;
        return Row<T>{row_of<const T>(matrix_of(rows.group), head.b, head.h, inside ? at : 0), inside};
    });
}

// The sum over the four lanes that hold a row.
__device__ __forceinline__ float sum_of_row(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}
__device__ __forceinline__ float largest_of_row(float value) {
    value = fmaxf(value, shuffle_xor(value, 1));
    return fmaxf(value, shuffle_xor(value, 2));
}

// scores += rows (row to row + 15 of `a`) times each row of `b`; strips without keys are left out.
template <int kStrips, class T, int D>
__device__ __forceinline__ void multiply_rows(float (&scores)[kStrips][4], Tile<T, D> a, int row, Tile<T, D> b,
                                              int strips) {
    // Unrolled whole, large D spill registers and take long to compile.
#pragma unroll(D * sizeof(T) > 512 ? 1 : 4)
    for (int column = 0; column < D; column += kDepth<T>) {
        const OperandA<T> rows = load_a(a, row, column);
#pragma unroll
        for (int s = 0; s < kStrips; s += 2)
            if (s < strips) {
                OperandB<T> keys[2];
                load_b(b, 8 * s, column, keys);
                multiply(scores[s], rows, keys[0]);
                multiply(scores[s + 1], rows, keys[1]);
            }
    }
}

// ------------------------------------------------------------------------------------------------------------- host

inline std::string shape(const Attention& a) {
    std::string text = "B, H, Lq, Lk, D =";
    for (const int64_t size : {a.batch, a.heads, a.queries, a.keys, a.dim}) text += " " + std::to_string(size);
    return text;
}

// Calls `function` with the least template argument D that holds the channels of a head.
template <class Function>
void with_dim(const Attention& a, Function function) {
    if (a.dim <= 16) return function(std::integral_constant<int, 16>{});
    if (a.dim <= 32) return function(std::integral_constant<int, 32>{});
    if (a.dim <= 64) return function(std::integral_constant<int, 64>{});
    if (a.dim <= 128) return function(std::integral_constant<int, 128>{});
    if (a.dim <= 256) return function(std::integral_constant<int, 256>{});
    throw std::invalid_argument("at most 256 channels a head");
}

// Two branches of one query become two queries.
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
        if (size > 0x7fffff00) throw std::invalid_argument("rows are counted in 31 bits: " + shape(a));
    bool aligned = true;
    const auto check = [&](const Matrix& m) {
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

// Compiled once for each type, by attention_forward.cu and attention_backward.cu.
template <class T>
void forward(const AttentionCall& c, const Queue& queue);
template <class T>
void backward(AttentionCall c, const Queue& queue);

}  // namespace sgalign::cuda
