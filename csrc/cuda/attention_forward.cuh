// Masked attention, forward: the output of each branch, and the log sums that the backward pass needs.
#pragma once

#include "attention.cuh"

namespace sgalign::cuda {

template <class T, int D, int kBranches, bool kPlain>
struct ForwardTiles {
    static constexpr int kRowBytes = D * sizeof(T);
    // Tiles of rows that a warp multiplies by the same keys. The warp's registers must hold the outputs of all tiles.
    static constexpr int kTiles = kPlain && sizeof(T) == 2 && D <= 64 ? 2 / kBranches : 1;
    static constexpr int kWarps = kRowBytes > 512 ? 2 : 4;
    static constexpr int kStrips = kRowBytes > 512 ? 2 : kRowBytes > 256 ? 4 : 8;
    static constexpr int kThreads = kWarp * kWarps, kBlockTiles = kWarps * kTiles;
    static constexpr int kKeyTile = 8 * kStrips * D, kQueryTile = kRows * kBlockTiles * D;  // elements
    static constexpr int kSharedBytes = (kQueryTile + 4 * kKeyTile) * int(sizeof(T)) + Padding<kStrips>::kBytes;
    static_assert(kSharedBytes <= kMostShared);
    // Blocks on a multiprocessor at once: as many as its registers hold.
    static constexpr int kBlocks = kRowBytes > 128 ? 1 : 2;
};

// Negate a query. This is needed for a negative scale, because the online softmax takes the largest product as the
// largest score.
template <int kElements, int kThreads, class T>
__device__ __forceinline__ void negate(T* elements) {
    uint32_t* const words = (uint32_t*)elements;
    for (int i = thread_index(); i < kElements * int(sizeof(T)) / 4; i += kThreads)
        shared_store(words + i, shared_load(words + i) ^ (sizeof(T) == 2 ? 0x80008000 : 0x80000000));
}

// A step of the online softmax for the two rows of a lane, in units of log2. `by` is subtracted from the scores, and
// `rescale` is the factor for all earlier sums. `top` becomes the maximum of each row.
struct Shift {
    float by[2], rescale[2];

    template <int kStrips>
    __device__ __forceinline__ Shift(const float (&scores)[kStrips][4], float scale, float (&top)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
            for (int s = 1; s < kStrips; ++s)
                largest = fmaxf(largest, fmaxf(scores[s][2 * half], scores[s][2 * half + 1]));
            largest = fmaxf(top[half], largest_of_row(largest) * scale);
            // A row without any kept entry so far has the maximum -inf. A shift by 0 makes its exponentials 0, not NaN.
            by[half] = largest == -infinity() ? 0 : largest;
            rescale[half] = fast_exp2(top[half] - by[half]);
            top[half] = largest;
        }
    }
};

// Store 16 output rows of a branch or, if the keys are split, their partial results for this block's part of the keys.
template <class T, int N>
__device__ __forceinline__ void store_output(const AttentionCall& c, const Head& head, const QueryRows& rows,
                                             int branch_index, const float (&out)[N][4], const float (&top)[2],
                                             const float (&sum)[2]) {
    const Attention& a = c.a;
    const Branch& branch = a.groups[rows.group].branches[branch_index];
    const int64_t all_rows = a.batch * a.heads * a.queries;
    const int lane = lane_index(), outputs = a.group_count * a.groups[0].count;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float total = sum_of_row(sum[half]);
        const int row = rows.first + lane / 4 + 8 * half;
        if (row >= a.queries) continue;
        const float factor = total == 0 ? 0 : dropout_scale(a) / total;
        const float log_sum = total == 0 ? infinity() : top[half] + log2f(total);
        const int64_t index = head.index * a.queries + row;
        // Parts are stored as [split][branch][row], first all outputs, then all log sums.
        const int64_t part = (int64_t(block_index_y()) * outputs + rows.group + branch_index) * all_rows + index;
        T* const to = row_of<T>(branch.out, head.b, head.h, row);
        float* const part_to = c.workspace + part * a.dim;
#pragma unroll
        for (int d = 0; d < N; ++d)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int column = 8 * d + lane % 4 * 2 + e;
                const float value = out[d][2 * half + e] * factor;
                if (column >= a.dim) continue;
                if (c.splits > 1)
                    part_to[column] = value;
                else
                    to[column] = from_float<T>(value);
            }
        if (lane % 4) continue;
        if (c.splits > 1)
            c.workspace[c.splits * outputs * all_rows * a.dim + part] = log_sum;
        else
            ((float*)branch.log_sum)[index] = log_sum;
    }
}

// Compute output rows. The block reads only the part of the keys with index block_index_y(). kBranches is the number of
// branches that share one query. The last branch has the random mask.
template <class T, int D, int kBranches, bool kPlain>
__global__ void __launch_bounds__(ForwardTiles<T, D, kBranches, kPlain>::kThreads,
                                  ForwardTiles<T, D, kBranches, kPlain>::kBlocks)
    attention_forward_kernel(const __grid_constant__ AttentionCall c) {
    using Tiles = ForwardTiles<T, D, kBranches, kPlain>;
    constexpr int kStrips = Tiles::kStrips, kTiles = Tiles::kTiles, kStep = kDepth<T> / 8;
    using Keys = KeyTiles<kStrips>;
    const Attention& a = c.a;
    const int row_tiles = QueryRows::count(a);
    const Head head(a, int(divide_up(row_tiles, Tiles::kBlockTiles)));
    const int first_tile = head.place * Tiles::kBlockTiles, warp_tile = warp_index() * kTiles;
    const auto rows = [&](int t) { return QueryRows(a, first_tile + warp_tile + t); };
    const bool idle = first_tile + warp_tile >= row_tiles;

    T* const memory = (T*)shared_memory();
    const Tile<T, D> queries{memory};
    T* const keys = memory + Tiles::kQueryTile;
    T* const values = keys + 2 * Tiles::kKeyTile;
    Padding<kStrips> padding(PaddedKeys(a, head), values + 2 * Tiles::kKeyTile);
    const HeadRows<T> all_keys(a.key, head), all_values(a.value, head);
    const auto load = [&](int tile, int stage) {
        const auto padded = padding.of(tile);
        const Tile<T, D> key_tile{keys + stage * Tiles::kKeyTile}, value_tile{values + stage * Tiles::kKeyTile};
        load_keys<kStrips, Tiles::kThreads, kPlain>(key_tile, all_keys, tile, padded, c);
        load_keys<kStrips, Tiles::kThreads, kPlain>(value_tile, all_values, tile, padded, c);
    };

    const int64_t tiles = Keys::count(a.keys);
    const int begin = int(tiles * block_index_y() / c.splits), end = int(tiles * (block_index_y() + 1) / c.splits);
    if (begin < end) {
        load_tile<kRows * Tiles::kBlockTiles, Tiles::kThreads>(queries, int(a.dim), kPlain || c.aligned, [&](int row) {
            const QueryRows from(a, first_tile + row / kRows);
            const int at = from.first + row % kRows;
            return HeadRows<T>(a.groups[from.group].query, head).row(at, at < a.queries);
        });
        padding.ask(begin);
        padding.store(begin);
        sync_block();
        load(begin, 0);
        padding.ask(begin + 1);
        if (a.scale < 0) {
            copies_wait();
            sync_block();
            negate<Tiles::kQueryTile, Tiles::kThreads>(memory);
        }
    }
    const uint64_t seed = load_seed(c);
    const float scale = fmaxf(fabsf(float(a.scale)) * kLog2e, kLeastScale);
    float out[kTiles][kBranches][D / 8][4] = {}, top[kTiles][kBranches][2], sum[kTiles][kBranches][2] = {};
    int row[kTiles];  // row of accumulator elements 0 and 1
    bool random[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        row[t] = rows(t).first + lane_index() / 4;
        random[t] = a.mask_threshold > 0 && a.groups[rows(t).group].branches[kBranches - 1].random;
#pragma unroll
        for (int branch = 0; branch < kBranches; ++branch) top[t][branch][0] = top[t][branch][1] = -infinity();
    }

    for (int tile = begin; tile < end; ++tile) {
        const int stage = (tile - begin) & 1, strips = Keys::strips(tile, a.keys);
        padding.store(tile + 1);
        copies_wait();
        sync_block();
        if (tile + 1 < end) load(tile + 1, stage ^ 1);
        padding.ask(tile + 2);
        if (idle) continue;

        float scores[kTiles][kStrips][4] = {};
        multiply_rows(scores, queries, kRows * warp_tile, Tile<T, D>{keys + stage * Tiles::kKeyTile}, strips);
        OperandA<T> weights[kTiles][kBranches][kStrips / kStep];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            drop_padded(scores[t], -infinity(), padding.of(tile));
            if (!kPlain && a.mask) drop_masked(scores[t], -infinity(), c, head, tile, row[t]);
#pragma unroll
            for (int branch = 0; branch < kBranches; ++branch) {
                if (branch == kBranches - 1 && random[t])
                    drop_drawn(scores[t], -infinity(), mask_random(c, seed), tile, row[t], head);
                float kept[kStrips][4];
                const Shift shift(scores[t], scale, top[t][branch]);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    sum[t][branch][half] *= shift.rescale[half];
#pragma unroll
                    for (int d = 0; d < D / 8; ++d)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; ++e) out[t][branch][d][e] *= shift.rescale[half];
                }
#pragma unroll
                for (int s = 0; s < kStrips; ++s)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        kept[s][e] = fast_exp2(fmaf(scores[t][s][e], scale, -shift.by[e / 2]));
                        sum[t][branch][e / 2] += kept[s][e];
                    }
                if (!kPlain && a.dropout_threshold > 0)
                    drop_drawn(kept, 0, dropout_random(c, seed), tile, row[t], head);
#pragma unroll
                for (int step = 0; step < kStrips / kStep; ++step)
                    weights[t][branch][step] = operand_of<T>(kept + step * kStep);
            }
        }
        const Tile<T, D> value_tile{values + stage * Tiles::kKeyTile};
#pragma unroll
        for (int step = 0; step < kStrips / kStep; ++step)
            if (is_multiplied<T, D>(step * kStep, strips)) {
#pragma unroll
                for (int d = 0; d < D / 8; d += 2) {
                    OperandB<T> b[2];
                    load_b_transposed(value_tile, 8 * kStep * step, 8 * d, b);
#pragma unroll
                    for (int t = 0; t < kTiles; ++t)
#pragma unroll
                        for (int branch = 0; branch < kBranches; ++branch) {
                            multiply(out[t][branch][d], weights[t][branch][step], b[0]);
                            multiply(out[t][branch][d + 1], weights[t][branch][step], b[1]);
                        }
                }
            }
    }
    if (idle) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int branch = 0; branch < kBranches; ++branch)
            store_output<T>(c, head, rows(t), branch, out[t][branch], top[t][branch], sum[t][branch]);
}

// Add the parts of a row, weighted by their sums. Each warp merges one row.
constexpr int kMergeWarps = 4;

template <class T>
__global__ void __launch_bounds__(kMergeWarps* kWarp) attention_merge_kernel(const __grid_constant__ AttentionCall c) {
    const Attention& a = c.a;
    const int outputs = a.group_count * a.groups[0].count;
    const int64_t all_rows = a.batch * a.heads * a.queries;
    const int64_t index = int64_t(block_index()) * kMergeWarps + warp_index();
    if (index >= outputs * all_rows) return;
    const float* const log_sums = c.workspace + c.splits * outputs * all_rows * a.dim + index;
    float top = -infinity(), sum = 0;
    for (int split = 0; split < c.splits; ++split) {
        const float log_sum = log_sums[split * outputs * all_rows];
        // +inf means that no entry is kept. A NaN must reach the result.
        if (log_sum != infinity()) top = log_sum > top || log_sum != log_sum ? log_sum : top;
    }
    for (int split = 0; split < c.splits; ++split) {
        const float log_sum = log_sums[split * outputs * all_rows];
        if (log_sum != infinity()) sum += fast_exp2(log_sum - top);
    }
    const int output = int(index / all_rows);
    const int64_t row = index % all_rows, query = row % a.queries, head = row / a.queries;
    const QueryGroup& group = a.groups[a.group_count == 2 ? output : 0];
    const Branch& branch = group.branches[a.group_count == 2 ? 0 : output];
    for (int d = lane_index(); d < a.dim; d += kWarp) {
        float value = 0;
        for (int split = 0; split < c.splits; ++split) {
            const float log_sum = log_sums[split * outputs * all_rows];
            if (log_sum != infinity())
                value += fast_exp2(log_sum - top) * c.workspace[(split * outputs * all_rows + index) * a.dim + d];
        }
        row_of<T>(branch.out, head / a.heads, head % a.heads, query)[d] = from_float<T>(sum == 0 ? 0 : value / sum);
    }
    if (lane_index() == 0) ((float*)branch.log_sum)[row] = sum == 0 ? infinity() : top + log2f(sum);
}

// ------------------------------------------------------------------------------------------------------------- host

template <class T, int D, int kBranches, bool kPlain>
void forward(const AttentionCall& c, const Queue& queue) {
    using Tiles = ForwardTiles<T, D, kBranches, kPlain>;
    const int64_t heads = c.a.batch * c.a.heads;
    launch("sgalign's attention of " + shape(c.a), attention_forward_kernel<T, D, kBranches, kPlain>,
           heads * divide_up(QueryRows::count(c.a), Tiles::kBlockTiles), c.splits, Tiles::kThreads, Tiles::kSharedBytes,
           queue, c);
    if (c.splits > 1)
        launch("sgalign's attention merge of " + shape(c.a), attention_merge_kernel<T>,
               divide_up(c.a.group_count * c.a.groups[0].count * heads * c.a.queries, kMergeWarps), 1,
               kMergeWarps * kWarp, 0, queue, c);
}

template <class T>
void forward(const AttentionCall& c, const Queue& queue) {
    if (c.a.batch * c.a.heads * c.a.queries == 0) return;
    with_dim(c.a, [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        // Two branches that share a query are computed together if a warp's registers can hold both outputs. This
        // excludes large D and calls that are not plain.
        if constexpr (D <= (sizeof(T) == 2 ? 128 : 32))
            if (c.a.groups[0].count == 2 && c.plain()) return forward<T, D, 2, true>(c, queue);
        AttentionCall apart = c;
        separate_queries(apart.a);
        c.plain() ? forward<T, D, 1, true>(apart, queue) : forward<T, D, 1, false>(apart, queue);
    });
}

}  // namespace sgalign::cuda
