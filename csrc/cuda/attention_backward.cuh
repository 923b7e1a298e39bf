// Masked attention, backward: one kernel for the queries, one for keys and values, which both compute the weights
// again.
#pragma once

#include "attention.cuh"

namespace sgalign::cuda {

// What follows from a score: the softmax's weight, what dropout leaves of it, and the score's gradient.
struct Gradient {
    float kept, score;
};

__device__ __forceinline__ Gradient gradient_of(float score, float grad_weight, float log_sum, float delta,
                                                bool is_dropped, bool drops_out, float dropout) {
    const float weight = is_dropped ? 0 : exp2f(score - log_sum);
    const float factor = drops_out ? 0 : dropout;
    // No product with what was dropped: its score may be NaN.
    return {weight * factor, is_dropped ? 0 : weight * (grad_weight * factor - delta)};
}

// ------------------------------------------------------------------------------------------------------------ delta

// sum_k P dP = sum_d O dO of each row, a warp a row: [branch][B, H, Lq].
constexpr int kDeltaWarps = 4;

template <class T>
__global__ void __launch_bounds__(kDeltaWarps* kWarp) attention_delta_kernel(const __grid_constant__ AttentionCall c) {
    const Attention& a = c.a;
    const int64_t all_rows = a.batch * a.heads * a.queries;
    const int64_t index = int64_t(block_index()) * kDeltaWarps + warp_index();
    if (index >= a.group_count * all_rows) return;  // every branch is a group here
    const Branch& branch = a.groups[index / all_rows].branches[0];
    const int64_t row = index % all_rows, head = row / a.queries;
    const T* const out = row_of<const T>(branch.out, head / a.heads, head % a.heads, row % a.queries);
    const T* const grad = row_of<const T>(branch.grad_out, head / a.heads, head % a.heads, row % a.queries);
    float sum = 0;
    for (int d = lane_index(); d < a.dim; d += kWarp) sum += to_float(out[d]) * to_float(grad[d]);
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() == 0) c.workspace[index] = sum;
}

// ---------------------------------------------------------------------------------------------------------- queries

template <class T, int D>
struct GradQueryTiles {
    static constexpr int kRowBytes = D * sizeof(T);
    static constexpr int kWarps = kRowBytes > 512 ? 1 : kRowBytes > 256 ? 2 : 4;
    static constexpr int kStrips = kRowBytes > 256 ? (sizeof(T) == 2 ? 4 : 2) : 8;
    static constexpr int kThreads = kWarp * kWarps;
    static constexpr int kKeyTile = 8 * kStrips * D;
    static constexpr int kSharedBytes = (2 * kRows * kWarps * D + 4 * kKeyTile) * int(sizeof(T)) + 2 * 2 * 4;
};

// Queries with a gradient of their own. With `c.shared_query` both groups have the same, and the first group's gradient
// is their sum.
__host__ __device__ inline int query_targets(const AttentionCall& c) { return c.shared_query ? 1 : c.a.group_count; }

// Where the keys are cut: parts of these gradients lie [split][query][row][D], behind the deltas.
__device__ __forceinline__ float* query_parts(const AttentionCall& c) {
    return c.workspace + c.a.group_count * c.a.batch * c.a.heads * c.a.queries;
}

template <class T, int D>
__global__ void __launch_bounds__(GradQueryTiles<T, D>::kThreads, 1)
    attention_grad_query_kernel(const __grid_constant__ AttentionCall c) {
    using Tiles = GradQueryTiles<T, D>;
    constexpr int kStrips = Tiles::kStrips, kWarps = Tiles::kWarps, kStep = kDepth<T> / 8;
    using Keys = KeyTiles<kStrips>;
    const Attention& a = c.a;
    const int targets = query_targets(c);
    const int row_tiles = int(divide_up(a.queries, kRows)) * targets;
    const Head head(a, int(divide_up(row_tiles, kWarps)));
    const int warp = warp_index(), lane = lane_index(), first_tile = head.place * kWarps;
    const int target = (first_tile + warp) % targets, first_row = (first_tile + warp) / targets * kRows;
    const bool idle = first_tile + warp >= row_tiles;

    T* const memory = (T*)shared_memory();
    const Tile<T, D> queries{memory}, grad_outs{memory + kRows * kWarps * D};
    T* const keys = memory + 2 * kRows * kWarps * D;
    T* const values = keys + 2 * Tiles::kKeyTile;
    uint32_t* const padding = (uint32_t*)(values + 2 * Tiles::kKeyTile);
    const auto load = [&](int tile, int stage) {
        load_keys<kStrips, Tiles::kThreads>(Tile<T, D>{keys + stage * Tiles::kKeyTile}, a.key, tile, c, head);
        load_keys<kStrips, Tiles::kThreads>(Tile<T, D>{values + stage * Tiles::kKeyTile}, a.value, tile, c, head);
        store_padding<kStrips>(padding + 2 * stage, tile, c, head);
    };
    const auto load_rows = [&](Tile<T, D> to, int pass, auto matrix_of) {
        load_tile<kRows * kWarps, Tiles::kThreads>(to, int(a.dim), c.aligned, [&](int row) {
            const int tile = first_tile + row / kRows, at = tile / targets * kRows + row % kRows;
            const bool inside = at < a.queries;
            const Matrix& matrix = matrix_of(a.groups[tile % targets + pass]);
            return Row<T>{row_of<const T>(matrix, head.b, head.h, inside ? at : 0), inside};
        });
    };

    const uint64_t seed = load_seed(c);
    const int64_t all_rows = a.batch * a.heads * a.queries;
    const float scale = float(a.scale) * kLog2e, dropout = dropout_scale(a);
    const int64_t tiles = Keys::count(a.keys);
    const int begin = int(tiles * block_index_y() / c.splits), end = int(tiles * (block_index_y() + 1) / c.splits);
    float grad_query[D / 8][4] = {};
    for (int pass = 0; pass < (c.shared_query ? a.group_count : 1); ++pass) {
        const Branch& branch = a.groups[target + pass].branches[0];
        float log_sum[2], delta[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + lane / 4 + 8 * half;
            const int64_t index = head.index * a.queries + row;
            const bool inside = row < a.queries;
            log_sum[half] = inside ? ((const float*)branch.log_sum)[index] : infinity();
            delta[half] = inside ? c.workspace[(target + pass) * all_rows + index] : 0;
        }
        sync_block();  // the tiles of the pass before are no longer read
        load_rows(queries, pass, [](const QueryGroup& group) -> const Matrix& { return group.query; });
        load_rows(grad_outs, pass, [](const QueryGroup& group) -> const Matrix& { return group.branches[0].grad_out; });
        if (begin < end) load(begin, 0);
        for (int tile = begin; tile < end; ++tile) {
            const int stage = (tile - begin) & 1, strips = Keys::strips(tile, a.keys);
            copies_wait();
            sync_block();
            if (tile + 1 < end) load(tile + 1, stage ^ 1);
            if (idle) continue;

            const Tile<T, D> key_tile{keys + stage * Tiles::kKeyTile}, value_tile{values + stage * Tiles::kKeyTile};
            float scores[kStrips][4] = {}, grad_weights[kStrips][4] = {};
            multiply_rows(scores, queries, kRows * warp, key_tile, strips);
            multiply_rows(grad_weights, grad_outs, kRows * warp, value_tile, strips);
            const Masks masks = tile_masks<kStrips>(c, head, seed, padding + 2 * stage, tile, first_row + lane / 4,
                                                    a.mask_threshold > 0 && branch.random);
            const uint32_t dropped = masks.shared | masks.random;
#pragma unroll
            for (int step = 0; step < kStrips / kStep; ++step)
                if (step * kStep < strips) {
#pragma unroll
                    for (int s = step * kStep; s < (step + 1) * kStep; ++s)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            scores[s][e] =
                                gradient_of(scores[s][e] * scale, grad_weights[s][e], log_sum[e / 2], delta[e / 2],
                                            bit(dropped, e, s), bit(masks.dropout, e, s), dropout)
                                    .score;
                    const OperandA<T> grad_scores = operand_of<T>(scores + step * kStep);
#pragma unroll
                    for (int d = 0; d < D / 8; d += 2) {
                        OperandB<T> b[2];
                        load_b_transposed(key_tile, 8 * kStep * step, 8 * d, b);
                        multiply(grad_query[d], grad_scores, b[0]);
                        multiply(grad_query[d + 1], grad_scores, b[1]);
                    }
                }
        }
        copies_wait();  // of rows, if there is no key at all
    }
    if (idle) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane / 4 + 8 * half;
        if (row >= a.queries) continue;
        const auto store = [&](auto* to) {
#pragma unroll
            for (int d = 0; d < D / 8; ++d)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column = 8 * d + lane % 4 * 2 + e;
                    if (column < a.dim)
                        to[column] =
                            from_float<std::decay_t<decltype(*to)>>(grad_query[d][2 * half + e] * float(a.scale));
                }
        };
        if (c.splits == 1) {
            store(row_of<T>(a.groups[target].grad_query, head.b, head.h, row));
        } else {
            const int64_t part = int64_t(block_index_y()) * targets + target;
            store(query_parts(c) + (part * all_rows + head.index * a.queries + row) * a.dim);
        }
    }
}

// Adds up the parts of the queries' gradients, in their order: a thread an element.
constexpr int kSumThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSumThreads) attention_sum_kernel(const __grid_constant__ AttentionCall c) {
    const Attention& a = c.a;
    const int64_t all_rows = a.batch * a.heads * a.queries;
    const int64_t count = query_targets(c) * all_rows * a.dim;
    const int64_t index = int64_t(block_index()) * kSumThreads + thread_index();
    if (index >= count) return;
    float sum = 0;
    for (int split = 0; split < c.splits; ++split) sum += query_parts(c)[split * count + index];
    const int64_t row = index / a.dim % all_rows, head = row / a.queries;
    const Matrix& to = a.groups[index / a.dim / all_rows].grad_query;
    row_of<T>(to, head / a.heads, head % a.heads, row % a.queries)[index % a.dim] = from_float<T>(sum);
}

// -------------------------------------------------------------------------------------------------- keys and values

template <class T, int D>
struct GradKeyTiles {
    static constexpr int kRowBytes = D * sizeof(T);
    static constexpr int kStrips = kRowBytes > 512 ? 2 : 8;
    static constexpr int kWarps = kStrips / 2, kThreads = kWarp * kWarps;
    static constexpr int kQueries = kRowBytes > 256 || sizeof(T) == 4 ? 16 : 32;  // of a tile
    static constexpr int kKeyTile = 8 * kStrips * D, kQueryTile = kQueries * D;
    static constexpr int kBits = kQueries * 8;  // bytes
    static constexpr int kSharedBytes = (2 * kKeyTile + 4 * kQueryTile) * int(sizeof(T)) + 4 * kBits;
    // Of the two gradients, as many columns as a warp's registers hold; a block computes these.
    static constexpr int kMostColumns = sizeof(T) == 2 ? 128 : 32;
    static constexpr int kColumns = D < kMostColumns ? D : kMostColumns;
};

// A block computes a tile of keys, a warp two strips of it, transposed: accumulators have a row for a key and a column
// for a query, and become the left operand of the product with queries or gradients of outputs. The mask is drawn by
// the block together, as a warp needs two of the eight strips that a Philox call decides.
template <class T, int D>
__global__ void __launch_bounds__(GradKeyTiles<T, D>::kThreads, 1)
    attention_grad_key_kernel(const __grid_constant__ AttentionCall c) {
    using Tiles = GradKeyTiles<T, D>;
    constexpr int kStrips = Tiles::kStrips, kQueries = Tiles::kQueries, kStep = kDepth<T> / 8;
    constexpr int kColumns = Tiles::kColumns;
    using Keys = KeyTiles<kStrips>;
    const Attention& a = c.a;
    const Head head(a, Keys::count(a.keys));
    const int tile = head.place, warp = warp_index(), lane = lane_index();
    const int first_column = block_index_y() * kColumns;
    const int first = Keys::first_key(tile), strip = first % kChunk / kMaskLanes;

    T* const memory = (T*)shared_memory();
    const Tile<T, D> keys{memory}, values{memory + Tiles::kKeyTile};
    T* const queries = memory + 2 * Tiles::kKeyTile;
    T* const grad_outs = queries + 2 * Tiles::kQueryTile;
    uint8_t* const random_bytes = (uint8_t*)(grad_outs + 2 * Tiles::kQueryTile);
    uint8_t* const dropout_bytes = random_bytes + 2 * Tiles::kBits;
    const uint64_t seed = load_seed(c);
    const Random random{seed, a.stream, a.mask_threshold};
    const Random dropout_random{seed, a.stream | kDropoutStreamBit, a.dropout_threshold};

    // Both groups' rows, one after the other.
    const int tiles_of_group = int(divide_up(a.queries, kQueries)), steps = a.group_count * tiles_of_group;
    const auto load = [&](int step, int stage) {
        const QueryGroup& group = a.groups[step / tiles_of_group];
        const int first_row = step % tiles_of_group * kQueries;
        const auto rows_of = [&](const Matrix& matrix) {
            return [&, first_row](int row) {
                const bool inside = first_row + row < a.queries;
                return Row<T>{row_of<const T>(matrix, head.b, head.h, inside ? first_row + row : 0), inside};
            };
        };
        load_tile<kQueries, Tiles::kThreads>(Tile<T, D>{queries + stage * Tiles::kQueryTile}, int(a.dim), c.aligned,
                                             rows_of(group.query));
        load_tile<kQueries, Tiles::kThreads>(Tile<T, D>{grad_outs + stage * Tiles::kQueryTile}, int(a.dim), c.aligned,
                                             rows_of(group.branches[0].grad_out));
        const bool any_random = group.branches[0].random && a.mask_threshold > 0;
        if (any_random || a.dropout_threshold > 0)
            for (int i = thread_index(); i < Tiles::kBits; i += Tiles::kThreads) {
                const int row = first_row + i / 8, column = first % kMaskLanes + i % 8;
                const auto draw = [&](const Random& source) {
                    return uint8_t(source.dropped(first / kChunk, column, row, uint32_t(head.index)) >> strip);
                };
                if (any_random) shared_store(random_bytes + stage * Tiles::kBits + i, draw(random));
                if (a.dropout_threshold > 0)
                    shared_store(dropout_bytes + stage * Tiles::kBits + i, draw(dropout_random));
            }
    };
    load_keys<kStrips, Tiles::kThreads>(keys, a.key, tile, c, head);
    load_keys<kStrips, Tiles::kThreads>(values, a.value, tile, c, head);
    if (steps) load(0, 0);

    int key[2];
    bool padded[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        key[half] = Keys::key(tile, kRows * warp + lane / 4 + 8 * half);
        padded[half] = key[half] >= a.keys || is_padded(a, head.b, key[half]);
    }
    const int64_t all_rows = a.batch * a.heads * a.queries;
    const float scale = float(a.scale) * kLog2e, dropout = dropout_scale(a);
    float grad_key[kColumns / 8][4] = {}, grad_value[kColumns / 8][4] = {};
    for (int step = 0; step < steps; ++step) {
        const int stage = step & 1, g = step / tiles_of_group, first_row = step % tiles_of_group * kQueries;
        const Branch& branch = a.groups[g].branches[0];
        copies_wait();
        sync_block();
        if (step + 1 < steps) load(step + 1, stage ^ 1);
        const Tile<T, D> query_tile{queries + stage * Tiles::kQueryTile};
        const Tile<T, D> grad_out_tile{grad_outs + stage * Tiles::kQueryTile};
        float scores[kQueries / 8][4] = {}, grad_weights[kQueries / 8][4] = {};
        multiply_rows(scores, keys, kRows * warp, query_tile, kQueries / 8);
        multiply_rows(grad_weights, values, kRows * warp, grad_out_tile, kQueries / 8);
        const bool any_random = branch.random && a.mask_threshold > 0;
#pragma unroll
        for (int column = 0; column < kQueries / 8; ++column)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const int at = 8 * column + lane % 4 * 2 + odd, row = first_row + at;
                const bool inside = row < a.queries;
                const int64_t index = head.index * a.queries + row;
                const float log_sum = inside ? ((const float*)branch.log_sum)[index] : infinity();
                const float delta = inside ? c.workspace[g * all_rows + index] : 0;
                const int byte = stage * Tiles::kBits + 8 * at + lane / 4;
                const uint32_t random_bits = any_random ? shared_load(random_bytes + byte) : 0;
                const uint32_t dropout_bits = a.dropout_threshold > 0 ? shared_load(dropout_bytes + byte) : 0;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int s = 2 * warp + half, e = 2 * half + odd;
                    const bool masked = a.mask && inside && !padded[half] && is_masked(a, head, row, key[half]);
                    const Gradient gradient = gradient_of(
                        scores[column][e] * scale, grad_weights[column][e], log_sum, delta,
                        !inside || padded[half] || masked || (random_bits >> s & 1), dropout_bits >> s & 1, dropout);
                    scores[column][e] = gradient.kept;
                    grad_weights[column][e] = gradient.score;
                }
            }
#pragma unroll
        for (int part = 0; part < kQueries / 8 / kStep; ++part) {
            const OperandA<T> kept = operand_of<T>(scores + part * kStep);
            const OperandA<T> grad_scores = operand_of<T>(grad_weights + part * kStep);
#pragma unroll
            for (int d = 0; d < kColumns / 8; d += 2) {
                OperandB<T> b[2];
                load_b_transposed(grad_out_tile, 8 * kStep * part, first_column + 8 * d, b);
                multiply(grad_value[d], kept, b[0]);
                multiply(grad_value[d + 1], kept, b[1]);
                load_b_transposed(query_tile, 8 * kStep * part, first_column + 8 * d, b);
                multiply(grad_key[d], grad_scores, b[0]);
                multiply(grad_key[d + 1], grad_scores, b[1]);
            }
        }
    }
    copies_wait();  // of keys, if there is no query at all
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (key[half] >= a.keys) continue;
        T* const to_key = row_of<T>(a.grad_key, head.b, head.h, key[half]);
        T* const to_value = row_of<T>(a.grad_value, head.b, head.h, key[half]);
#pragma unroll
        for (int d = 0; d < kColumns / 8; ++d)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int column = first_column + 8 * d + lane % 4 * 2 + e;
                if (column >= a.dim) continue;
                to_key[column] = from_float<T>(grad_key[d][2 * half + e] * float(a.scale));
                to_value[column] = from_float<T>(grad_value[d][2 * half + e]);
            }
    }
}

// ------------------------------------------------------------------------------------------------------------- host

template <class T>
void backward(AttentionCall c, const Queue& queue) {
    c.shared_query = c.a.groups[0].count == 2;
    separate_queries(c.a);
    const int64_t heads = c.a.batch * c.a.heads, rows = heads * c.a.queries;
    launch("sgalign's attention backward (delta) of " + shape(c.a), attention_delta_kernel<T>,
           divide_up(c.a.group_count * rows, kDeltaWarps), 1, kDeltaWarps * kWarp, 0, queue, c);
    with_dim(c.a, [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        using QueryTiles = GradQueryTiles<T, D>;
        using Tiles = GradKeyTiles<T, D>;
        const int targets = query_targets(c);
        launch("sgalign's attention backward (query) of " + shape(c.a), attention_grad_query_kernel<T, D>,
               heads * divide_up(divide_up(c.a.queries, kRows) * targets, QueryTiles::kWarps), c.splits,
               QueryTiles::kThreads, QueryTiles::kSharedBytes, queue, c);
        if (c.splits > 1)
            launch("sgalign's attention backward (sum) of " + shape(c.a), attention_sum_kernel<T>,
                   divide_up(targets * rows * c.a.dim, kSumThreads), 1, kSumThreads, 0, queue, c);
        launch("sgalign's attention backward (key, value) of " + shape(c.a), attention_grad_key_kernel<T, D>,
               heads * KeyTiles<Tiles::kStrips>::count(c.a.keys), D / Tiles::kColumns, Tiles::kThreads,
               Tiles::kSharedBytes, queue, c);
    });
}

}  // namespace sgalign::cuda
