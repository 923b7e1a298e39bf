// Masked attention, forward: the output of each branch, and the log sums that the backward needs.
#pragma once

#include "attention.cuh"

namespace sgalign::cuda {

// What fits into 99 KB of shared memory, the least that any of these GPUs has.
template <class T, int D>
struct ForwardTiles {
    static constexpr int kRowBytes = D * sizeof(T);
    static constexpr int kWarps = kRowBytes > 512 ? 2 : 4;
    static constexpr int kStrips = kRowBytes > 512 ? 2 : kRowBytes > 256 ? 4 : 8;
    static constexpr int kThreads = kWarp * kWarps;
    static constexpr int kKeyTile = 8 * kStrips * D;  // elements
    static constexpr int kSharedBytes = (kRows * kWarps * D + 4 * kKeyTile) * int(sizeof(T)) + 2 * 2 * 4;
};

// Rows of part block_index_y() of the keys. kBranches: those that share one query.
template <class T, int D, int kBranches>
__global__ void __launch_bounds__(ForwardTiles<T, D>::kThreads, 1)
    attention_forward_kernel(const __grid_constant__ AttentionCall c) {
    using Tiles = ForwardTiles<T, D>;
    constexpr int kStrips = Tiles::kStrips, kWarps = Tiles::kWarps, kStep = kDepth<T> / 8;
    using Keys = KeyTiles<kStrips>;
    const Attention& a = c.a;
    const int row_tiles = QueryRows::count(a);
    const Head head(a, int(divide_up(row_tiles, kWarps)));
    const int warp = warp_index(), lane = lane_index(), first_tile = head.place * kWarps;
    const QueryRows rows(a, first_tile + warp);
    const bool idle = first_tile + warp >= row_tiles;
    const QueryGroup& group = a.groups[rows.group];

    T* const memory = (T*)shared_memory();
    const Tile<T, D> queries{memory};
    T* const keys = memory + kRows * kWarps * D;
    T* const values = keys + 2 * Tiles::kKeyTile;
    uint32_t* const padding = (uint32_t*)(values + 2 * Tiles::kKeyTile);
    const auto load = [&](int tile, int stage) {
        load_keys<kStrips, Tiles::kThreads>(Tile<T, D>{keys + stage * Tiles::kKeyTile}, a.key, tile, c, head);
        load_keys<kStrips, Tiles::kThreads>(Tile<T, D>{values + stage * Tiles::kKeyTile}, a.value, tile, c, head);
        store_padding<kStrips>(padding + 2 * stage, tile, c, head);
    };

    const int64_t tiles = Keys::count(a.keys);
    const int begin = int(tiles * block_index_y() / c.splits), end = int(tiles * (block_index_y() + 1) / c.splits);
    if (begin < end) {
        load_rows<kWarps>(queries, first_tile, c, head, [&](int g) -> const Matrix& { return a.groups[g].query; });
        load(begin, 0);
    }
    const uint64_t seed = load_seed(c);
    const bool any_random = a.mask_threshold > 0 && group.branches[group.count - 1].random;
    const float scale = float(a.scale) * kLog2e;
    float out[kBranches][D / 8][4] = {}, top[kBranches][2], sum[kBranches][2] = {};
#pragma unroll
    for (int branch = 0; branch < kBranches; ++branch) top[branch][0] = top[branch][1] = -infinity();

    for (int tile = begin; tile < end; ++tile) {
        const int stage = (tile - begin) & 1, strips = Keys::strips(tile, a.keys);
        copies_wait();
        sync_block();
        if (tile + 1 < end) load(tile + 1, stage ^ 1);
        if (idle) continue;

        float scores[kStrips][4] = {};
        multiply_rows(scores, queries, kRows * warp, Tile<T, D>{keys + stage * Tiles::kKeyTile}, strips);
        const Masks masks =
            tile_masks<kStrips>(c, head, seed, padding + 2 * stage, tile, rows.first + lane / 4, any_random);
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[s][e] *= scale;

        OperandA<T> weights[kBranches][kStrips / kStep];
#pragma unroll
        for (int branch = 0; branch < kBranches; ++branch) {
            const uint32_t dropped = masks.shared | (group.branches[branch].random ? masks.random : 0);
            float shift[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float largest = top[branch][half];
#pragma unroll
                for (int s = 0; s < kStrips; ++s)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e)
                        if (!bit(dropped, e, s)) largest = fmaxf(largest, scores[s][e]);
                largest = largest_of_row(largest);
                // A row with nothing kept so far has the maximum -inf: a shift by 0 makes its exponentials 0, not NaN.
                shift[half] = largest == -infinity() ? 0 : largest;
                const float rescale = exp2f(top[branch][half] - shift[half]);
                top[branch][half] = largest;
                sum[branch][half] *= rescale;
#pragma unroll
                for (int d = 0; d < D / 8; ++d)
                    out[branch][d][2 * half] *= rescale, out[branch][d][2 * half + 1] *= rescale;
            }
#pragma unroll
            for (int step = 0; step < kStrips / kStep; ++step) {
                float kept[kStep][4];
#pragma unroll
                for (int i = 0; i < kStep; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int s = step * kStep + i;
                        const float weight = bit(dropped, e, s) ? 0 : exp2f(scores[s][e] - shift[e / 2]);
                        sum[branch][e / 2] += weight;
                        kept[i][e] = bit(masks.dropout, e, s) ? 0 : weight;
                    }
                weights[branch][step] = operand_of<T>(kept);
            }
        }
        const Tile<T, D> value_tile{values + stage * Tiles::kKeyTile};
#pragma unroll
        for (int step = 0; step < kStrips / kStep; ++step)
            if (step * kStep < strips) {
#pragma unroll
                for (int d = 0; d < D / 8; d += 2) {
                    OperandB<T> b[2];
                    load_b_transposed(value_tile, 8 * kStep * step, 8 * d, b);
#pragma unroll
                    for (int branch = 0; branch < kBranches; ++branch) {
                        multiply(out[branch][d], weights[branch][step], b[0]);
                        multiply(out[branch][d + 1], weights[branch][step], b[1]);
                    }
                }
            }
    }
    if (idle) return;
    const int64_t all_rows = a.batch * a.heads * a.queries;
#pragma unroll
    for (int branch = 0; branch < kBranches; ++branch)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = sum_of_row(sum[branch][half]);
            const int row = rows.first + lane / 4 + 8 * half;
            if (row >= a.queries) continue;
            const float factor = total == 0 ? 0 : dropout_scale(a) / total;
            const float log_sum = total == 0 ? infinity() : top[branch][half] + log2f(total);
            const int64_t index = head.index * a.queries + row;
            // Parts of a row lie [split][branch][row], the log sums behind the outputs.
            const int outputs = a.group_count * a.groups[0].count;
            const int64_t part = (int64_t(block_index_y()) * outputs + rows.group + branch) * all_rows + index;
            T* const to = row_of<T>(group.branches[branch].out, head.b, head.h, row);
            float* const part_to = c.workspace + part * a.dim;
#pragma unroll
            for (int d = 0; d < D / 8; ++d)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column = 8 * d + lane % 4 * 2 + e;
                    const float value = out[branch][d][2 * half + e] * factor;
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
                ((float*)group.branches[branch].log_sum)[index] = log_sum;
        }
}

// Adds up the parts of a row, weighed by their sums: a warp a row.
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
        // +inf stands for nothing kept; NaN must not vanish.
        if (log_sum != infinity()) top = log_sum > top || log_sum != log_sum ? log_sum : top;
    }
    for (int split = 0; split < c.splits; ++split) {
        const float log_sum = log_sums[split * outputs * all_rows];
        if (log_sum != infinity()) sum += exp2f(log_sum - top);
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
                value += exp2f(log_sum - top) * c.workspace[(split * outputs * all_rows + index) * a.dim + d];
        }
        row_of<T>(branch.out, head / a.heads, head % a.heads, query)[d] = from_float<T>(sum == 0 ? 0 : value / sum);
    }
    if (lane_index() == 0) ((float*)branch.log_sum)[row] = sum == 0 ? infinity() : top + log2f(sum);
}

// ------------------------------------------------------------------------------------------------------------- host

template <class T, int D, int kBranches>
void forward(const AttentionCall& c, const Queue& queue) {
    using Tiles = ForwardTiles<T, D>;
    const int64_t heads = c.a.batch * c.a.heads;
    launch("sgalign's attention of " + shape(c.a), attention_forward_kernel<T, D, kBranches>,
           heads * divide_up(QueryRows::count(c.a), Tiles::kWarps), c.splits, Tiles::kThreads, Tiles::kSharedBytes,
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
        // The outputs of two branches must fit into a warp's registers.
        if constexpr (D <= (sizeof(T) == 2 ? 128 : 32))
            if (c.a.groups[0].count == 2) return forward<T, D, 2>(c, queue);
        AttentionCall apart = c;
        separate_queries(apart.a);
        forward<T, D, 1>(apart, queue);
    });
}

}  // namespace sgalign::cuda
