// Masked attention, backward. One kernel computes the gradients of the queries, and another computes the gradients of
// keys and values. Both compute the attention weights again.
#pragma once

#include "attention.cuh"

namespace sgalign::cuda {

// The scale in units of log2, and the value that replaces a dropped score to make its weight 0.
struct Scale {
    float factor, dropped;
    __device__ explicit Scale(const Attention& a)
        : factor(copysignf(fmaxf(fabsf(float(a.scale)) * kLog2e, kLeastScale), float(a.scale))),
          dropped(copysignf(infinity(), -factor)) {}
};

// ------------------------------------------------------------------------------------------------------------ delta

// delta = sum_k P dP = sum_d O dO of each row: [branch][B, H, Lq]. Each warp computes one row.
constexpr int kDeltaWarps = 4;

template <class T>
__global__ void __launch_bounds__(kDeltaWarps* kWarp) attention_delta_kernel(const __grid_constant__ AttentionCall c) {
    const Attention& a = c.a;
    const int64_t all_rows = a.batch * a.heads * a.queries;
    const int64_t index = int64_t(block_index()) * kDeltaWarps + warp_index();
    if (index >= a.group_count * all_rows) return;  // each group has one branch here
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

template <class T, int D, bool kPlain>
struct GradQueryTiles {
    static constexpr int kRowBytes = D * sizeof(T);
    // tiles of rows that a warp multiplies by the same keys
    static constexpr int kTiles = kPlain && kRowBytes <= 128 ? 2 : 1;
    static constexpr int kWarps = kRowBytes > 512 ? 1 : kRowBytes > 256 ? 2 : 4;
    static constexpr int kStrips = kRowBytes > 256 ? (sizeof(T) == 2 ? 4 : 2) : 8;
    static constexpr int kThreads = kWarp * kWarps, kBlockTiles = kWarps * kTiles;
    static constexpr int kKeyTile = 8 * kStrips * D, kQueryTile = kRows * kBlockTiles * D;
    static constexpr int kSharedBytes = (2 * kQueryTile + 4 * kKeyTile) * int(sizeof(T)) + Padding<kStrips>::kBytes;
    static_assert(kSharedBytes <= kMostShared);
    static constexpr int kBlocks = kRowBytes > 128 ? 1 : 2;
};

// The number of query gradients to write. If `c.shared_query` is true, both groups have the same query. Its gradient is
// the sum over both groups and is written to the first group.
__host__ __device__ inline int query_targets(const AttentionCall& c) { return c.shared_query ? 1 : c.a.group_count; }

// The parts of the query gradients if the keys are split, in the workspace after the deltas: [split][query][row][D].
__device__ __forceinline__ float* query_parts(const AttentionCall& c) {
    return c.workspace + c.a.group_count * c.a.batch * c.a.heads * c.a.queries;
}

template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(GradQueryTiles<T, D, kPlain>::kThreads, GradQueryTiles<T, D, kPlain>::kBlocks)
    attention_grad_query_kernel(const __grid_constant__ AttentionCall c) {
    using Tiles = GradQueryTiles<T, D, kPlain>;
    constexpr int kStrips = Tiles::kStrips, kTiles = Tiles::kTiles, kStep = kDepth<T> / 8;
    using Keys = KeyTiles<kStrips>;
    const Attention& a = c.a;
    const int targets = query_targets(c);
    const int row_tiles = int(divide_up(a.queries, kRows)) * targets;
    const Head head(a, int(divide_up(row_tiles, Tiles::kBlockTiles)));
    const int lane = lane_index(), first_tile = head.place * Tiles::kBlockTiles, warp_tile = warp_index() * kTiles;
    int target[kTiles], row[kTiles];  // `row` is that of accumulator elements 0 and 1
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        target[t] = (first_tile + warp_tile + t) % targets;
        row[t] = (first_tile + warp_tile + t) / targets * kRows + lane / 4;
    }

    T* const memory = (T*)shared_memory();
    const Tile<T, D> queries{memory}, grad_outs{memory + Tiles::kQueryTile};
    T* const keys = memory + 2 * Tiles::kQueryTile;
    T* const values = keys + 2 * Tiles::kKeyTile;
    Padding<kStrips> padding(PaddedKeys(a, head), values + 2 * Tiles::kKeyTile);
    const HeadRows<T> all_keys(a.key, head), all_values(a.value, head);
    const auto load = [&](int tile, int stage) {
        const auto padded = padding.of(tile);
        const Tile<T, D> key_tile{keys + stage * Tiles::kKeyTile}, value_tile{values + stage * Tiles::kKeyTile};
        load_keys<kStrips, Tiles::kThreads, kPlain>(key_tile, all_keys, tile, padded, c);
        load_keys<kStrips, Tiles::kThreads, kPlain>(value_tile, all_values, tile, padded, c);
    };
    const auto load_rows = [&](Tile<T, D> to, int pass, auto matrix_of) {
        load_tile<kRows * Tiles::kBlockTiles, Tiles::kThreads>(to, int(a.dim), kPlain || c.aligned, [&](int row) {
            const int tile = first_tile + row / kRows, at = tile / targets * kRows + row % kRows;
            return HeadRows<T>(matrix_of(a.groups[tile % targets + pass]), head).row(at, at < a.queries);
        });
    };

    const uint64_t seed = load_seed(c);
    const int64_t all_rows = a.batch * a.heads * a.queries;
    const Scale scale(a);
    const int64_t tiles = Keys::count(a.keys);
    const int begin = int(tiles * block_index_y() / c.splits), end = int(tiles * (block_index_y() + 1) / c.splits);
    float grad_query[kTiles][D / 8][4] = {};
    for (int pass = 0; pass < (c.shared_query ? a.group_count : 1); ++pass) {
        float log_sum[kTiles][2], delta[kTiles][2];
        bool random[kTiles];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const Branch& branch = a.groups[target[t] + pass].branches[0];
            random[t] = a.mask_threshold > 0 && branch.random;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t index = head.index * a.queries + row[t] + 8 * half;
                const bool inside = row[t] + 8 * half < a.queries;
                log_sum[t][half] = inside ? ((const float*)branch.log_sum)[index] : infinity();
                delta[t][half] = inside ? c.workspace[(target[t] + pass) * all_rows + index] : 0;
            }
        }
        sync_block();  // no warp reads the tiles of the previous pass any longer
        load_rows(queries, pass, [](const QueryGroup& group) -> const Matrix& { return group.query; });
        load_rows(grad_outs, pass, [](const QueryGroup& group) -> const Matrix& { return group.branches[0].grad_out; });
        if (begin < end) {
            padding.ask(begin);
            padding.store(begin);
            sync_block();
            load(begin, 0);
            padding.ask(begin + 1);
        }
        for (int tile = begin; tile < end; ++tile) {
            const int stage = (tile - begin) & 1, strips = Keys::strips(tile, a.keys);
            padding.store(tile + 1);
            copies_wait();
            sync_block();
            if (tile + 1 < end) load(tile + 1, stage ^ 1);
            padding.ask(tile + 2);

            const Tile<T, D> key_tile{keys + stage * Tiles::kKeyTile}, value_tile{values + stage * Tiles::kKeyTile};
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                // The tiles are computed one after the other, because there are not enough registers for both at once.
                if (row[t] - lane / 4 >= a.queries) continue;
                float scores[1][kStrips][4] = {}, grad_weights[1][kStrips][4];
#pragma unroll
                for (int s = 0; s < kStrips; ++s)
#pragma unroll
                    for (int e = 0; e < 4; ++e) grad_weights[0][s][e] = kPlain ? -delta[t][e / 2] : 0;
                multiply_rows(scores, queries, kRows * (warp_tile + t), key_tile, strips);
                multiply_rows(grad_weights, grad_outs, kRows * (warp_tile + t), value_tile, strips);
                drop_padded(scores[0], scale.dropped, padding.of(tile));
                if (!kPlain && a.mask) drop_masked(scores[0], scale.dropped, c, head, tile, row[t]);
                if (random[t]) drop_drawn(scores[0], scale.dropped, mask_random(c, seed), tile, row[t], head);
                if (!kPlain) {
                    if (a.dropout_threshold > 0)
                        drop_drawn(grad_weights[0], 0, dropout_random(c, seed), tile, row[t], head);
#pragma unroll
                    for (int s = 0; s < kStrips; ++s)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            grad_weights[0][s][e] = fmaf(grad_weights[0][s][e], dropout_scale(a), -delta[t][e / 2]);
                }
#pragma unroll
                for (int s = 0; s < kStrips; ++s)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        scores[0][s][e] =
                            fast_exp2(fmaf(scores[0][s][e], scale.factor, -log_sum[t][e / 2])) * grad_weights[0][s][e];
#pragma unroll
                for (int step = 0; step < kStrips / kStep; ++step)
                    if (is_multiplied<T, D>(step * kStep, strips)) {
                        const OperandA<T> grad_scores = operand_of<T>(scores[0] + step * kStep);
#pragma unroll
                        for (int d = 0; d < D / 8; d += 2) {
                            OperandB<T> b[2];
                            load_b_transposed(key_tile, 8 * kStep * step, 8 * d, b);
                            multiply(grad_query[t][d], grad_scores, b[0]);
                            multiply(grad_query[t][d + 1], grad_scores, b[1]);
                        }
                    }
            }
        }
        copies_wait();  // for the copies of rows, if there are no keys
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = row[t] + 8 * half;
            if (at >= a.queries) continue;
            const auto store = [&](auto* to) {
#pragma unroll
                for (int d = 0; d < D / 8; ++d)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int column = 8 * d + lane % 4 * 2 + e;
                        if (column < a.dim)
                            to[column] = from_float<std::decay_t<decltype(*to)>>(grad_query[t][d][2 * half + e] *
                                                                                 float(a.scale));
                    }
            };
            if (c.splits == 1) {
                store(row_of<T>(a.groups[target[t]].grad_query, head.b, head.h, at));
            } else {
                const int64_t part = int64_t(block_index_y()) * targets + target[t];
                store(query_parts(c) + (part * all_rows + head.index * a.queries + at) * a.dim);
            }
        }
}

// Sum the parts of the query gradients in order. Each thread sums one element.
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

// The numbers that the score gradients of one query need. TwoTerms holds them for two neighboring queries.
struct Terms {
    float log_sum, delta;
};
struct alignas(16) TwoTerms {
    Terms terms[2];
};

template <class T, int D>
struct GradKeyTiles {
    static constexpr int kRowBytes = D * sizeof(T);
    static constexpr int kStrips = kRowBytes > 512 ? 2 : kRowBytes > 256 ? 4 : 8;
    static constexpr int kWarps = kStrips / 2, kThreads = kWarp * kWarps;
    static constexpr int kQueries = sizeof(T) == 4    ? 16
                                    : kRowBytes > 256 ? 16
                                    : kRowBytes > 128 ? 32
                                                      : 64;  // queries of a tile
    static constexpr int kKeyTile = 8 * kStrips * D, kQueryTile = kQueries * D;
    // Random numbers are stored as [word][column][query]. If there is room, each row is followed by 8 unused words, so
    // lanes that load the words of two neighboring queries access each bank once.
    static constexpr int kColumn = kQueries + (kRowBytes > 512 ? 0 : 8), kWord = 8 * kColumn, kDrawn = kWarps * kWord;
    static constexpr int kDrawnBytes = 2 * kDrawn * 4;  // for the mask; dropout needs as many again
    static constexpr int kSharedBytes =
        (2 * kKeyTile + 4 * kQueryTile) * int(sizeof(T)) + 2 * kQueries * int(sizeof(Terms));
    static_assert(kSharedBytes + 2 * kDrawnBytes <= kMostShared);
    // Columns of the two gradients that a block computes, as many as a warp's registers hold.
    static constexpr int kMostColumns = sizeof(T) == 2 ? 128 : 32;
    static constexpr int kColumns = D < kMostColumns ? D : kMostColumns;
    static constexpr int kBlocks = kRowBytes > 128 ? 1 : kRowBytes > 64 ? 2 : 3;
};

struct alignas(8) TwoWords {
    uint32_t words[2];
};

// Each block computes a tile of keys, and each warp two strips of it. Scores are transposed: an accumulator has a row
// per key and a column per query. Accumulators become the left operand of the product with queries or output gradients.
// A Philox call decides eight strips, but a warp needs only one word of the result, for its two strips. All warps of
// the block therefore draw the random numbers together.
template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(GradKeyTiles<T, D>::kThreads, kPlain ? GradKeyTiles<T, D>::kBlocks : 1)
    attention_grad_key_kernel(const __grid_constant__ AttentionCall c) {
    using Tiles = GradKeyTiles<T, D>;
    constexpr int kStrips = Tiles::kStrips, kQueries = Tiles::kQueries, kStep = kDepth<T> / 8;
    constexpr int kColumns = Tiles::kColumns, kThreads = Tiles::kThreads;
    using Keys = KeyTiles<kStrips>;
    const Attention& a = c.a;
    const Head head(a, Keys::count(a.keys));
    const int tile = head.place, warp = warp_index(), lane = lane_index();
    const int first_column = block_index_y() * kColumns;

    T* const memory = (T*)shared_memory();
    const Tile<T, D> keys{memory}, values{memory + Tiles::kKeyTile};
    T* const queries = memory + 2 * Tiles::kKeyTile;
    T* const grad_outs = queries + 2 * Tiles::kQueryTile;
    Terms* const terms = (Terms*)(grad_outs + 2 * Tiles::kQueryTile);
    uint32_t* const drawn = (uint32_t*)(terms + 2 * kQueries);
    uint32_t* const dropout_drawn = drawn + (a.mask_threshold > 0 ? 2 * Tiles::kDrawn : 0);
    const uint64_t seed = load_seed(c);
    const Random random = mask_random(c, seed), dropout = dropout_random(c, seed);

    // The inputs of a group. The steps go through the rows of the first group, then through those of the second.
    struct Source {
        HeadRows<T> queries, grad_outs;
        const float *log_sums, *deltas;
        bool random;
    };
    const auto source = [&](int g) -> Source {
        const Branch& branch = a.groups[g].branches[0];
        const int64_t first = head.index * a.queries, deltas = g * a.batch * a.heads * a.queries;
        return {{a.groups[g].query, head},
                {branch.grad_out, head},
                (const float*)branch.log_sum + first,
                c.workspace + deltas + first,
                a.mask_threshold > 0 && branch.random};
    };
    const Source sources[2] = {source(0), source(a.group_count - 1)};
    const int rows = int(a.queries), tiles_of_group = int(divide_up(a.queries, kQueries));
    const int steps = a.group_count * tiles_of_group;
    const auto source_of = [&](int step) { return step < tiles_of_group ? sources[0] : sources[1]; };
    const auto first_row_of = [&](int step) {
        return (step < tiles_of_group ? step : step - tiles_of_group) * kQueries;
    };
    const auto draw = [&](const Random& source, uint32_t* to, int first_row) {
        const uint32_t first = Keys::first_key(tile), word = first % kChunk / kMaskLanes / 2;
#pragma unroll
        for (int drawn = 0; drawn < 8 * kQueries; drawn += kThreads) {
            uint32_t words[4];
            const int i = drawn + thread_index(), column = i / kQueries, at = i % kQueries;
            source.draw(first / kChunk, first % kMaskLanes + column, first_row + at, uint32_t(head.index), words);
#pragma unroll
            for (int w = 0; w < 4; ++w)
                if (w - word < uint32_t(Tiles::kWarps))
                    shared_store(to + (w - word) * Tiles::kWord + column * Tiles::kColumn + at, words[w]);
        }
    };
    const auto load = [&](int step, int stage) {
        const Source from = source_of(step);
        const int first_row = first_row_of(step);
        const Tile<T, D> query_tile{queries + stage * Tiles::kQueryTile};
        const Tile<T, D> grad_out_tile{grad_outs + stage * Tiles::kQueryTile};
        const auto load_rows = [&](Tile<T, D> to, const HeadRows<T>& of) {
            load_tile<kQueries, kThreads>(to, int(a.dim), kPlain || c.aligned,
                                          [&](int row) { return of.row(first_row + row, first_row + row < rows); });
        };
        load_rows(query_tile, from.queries);
        load_rows(grad_out_tile, from.grad_outs);
        // Queries past the last one have the weight 1, but their rows are zeros and add nothing.
        static_assert(kQueries <= kThreads);
        if (const int i = thread_index(); i < kQueries) {
            const bool inside = first_row + i < rows;
            Terms* const to = terms + stage * kQueries + i;
            copy_word_async(&to->log_sum, from.log_sums + first_row + i, inside);
            copy_word_async(&to->delta, from.deltas + first_row + i, inside);
        }
        if (from.random) draw(random, drawn + stage * Tiles::kDrawn, first_row);
        if (!kPlain && a.dropout_threshold > 0) draw(dropout, dropout_drawn + stage * Tiles::kDrawn, first_row);
    };
    const PaddedKeys padded(a, head);
    const auto load_kept = [&](Tile<T, D> to, const Matrix& from) {
        load_tile<8 * kStrips, kThreads>(to, int(a.dim), kPlain || c.aligned, [&](uint32_t row) {
            const uint32_t key = Keys::key(tile, row);
            return HeadRows<T>(from, head).row(key, !padded.has(key));
        });
    };
    load_kept(keys, a.key);
    load_kept(values, a.value);
    if (steps) load(0, 0);

    const Scale scale(a);
    float grad_key[kColumns / 8][4] = {}, grad_value[kColumns / 8][4] = {};
    for (int step = 0; step < steps; ++step) {
        const int stage = step & 1;
        copies_wait();
        sync_block();
        if (step + 1 < steps) load(step + 1, stage ^ 1);
        const Tile<T, D> query_tile{queries + stage * Tiles::kQueryTile};
        const Tile<T, D> grad_out_tile{grad_outs + stage * Tiles::kQueryTile};
        float products[2][1][kQueries / 8][4] = {};
        multiply_rows(products[0], keys, kRows * warp, query_tile, kQueries / 8);
        multiply_rows(products[1], values, kRows * warp, grad_out_tile, kQueries / 8);
        auto &scores = products[0][0], &grad_weights = products[1][0];

        // Element e of column tile i belongs to key e / 2 of this lane and to query `at(i)` + e % 2 of the tile.
        const auto at = [&](int i) { return 8 * i + lane % 4 * 2; };
        const auto drop_drawn = [&](float (&values)[kQueries / 8][4], float with, const uint32_t* from,
                                    uint32_t limit) {
            TwoWords two[kQueries / 8];
#pragma unroll
            for (int i = 0; i < kQueries / 8; ++i)
                two[i] = shared_load((const TwoWords*)(from + stage * Tiles::kDrawn + warp * Tiles::kWord +
                                                       lane / 4 * Tiles::kColumn + at(i)));
            drop(values, with, [&](int i, int e) { return is_below(two[i].words[e % 2], e / 2, limit); });
        };
        if (!kPlain && a.mask)
            drop(scores, scale.dropped, [&](int i, int e) {
                const uint32_t key = Keys::key(tile, kRows * warp + lane / 4 + e / 2 * 8);
                return is_masked(a, head, first_row_of(step) + at(i) + e % 2, key);
            });
        if (source_of(step).random) drop_drawn(scores, scale.dropped, drawn, random.limit());
        if (!kPlain && a.dropout_threshold > 0) drop_drawn(grad_weights, 0, dropout_drawn, dropout.limit());
#pragma unroll
        for (int i = 0; i < kQueries / 8; ++i) {
            const TwoTerms two = shared_load((const TwoTerms*)(terms + stage * kQueries + at(i)));
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Terms& query = two.terms[e % 2];
                scores[i][e] = fast_exp2(fmaf(scores[i][e], scale.factor, -query.log_sum));
                grad_weights[i][e] =
                    scores[i][e] * (grad_weights[i][e] * (kPlain ? 1 : dropout_scale(a)) - query.delta);
            }
        }
        if (!kPlain && a.dropout_threshold > 0) {
            drop_drawn(scores, 0, dropout_drawn, dropout.limit());
#pragma unroll
            for (int i = 0; i < kQueries / 8; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) scores[i][e] *= dropout_scale(a);
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
    copies_wait();  // for the copies of keys, if there are no queries
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t key = Keys::key(tile, kRows * warp + lane / 4 + 8 * half);
        if (key >= a.keys) continue;
        // The weights of padded keys are not 0 here. Only their own gradients use them, and these are stored as 0.
        const bool kept = !padded.has(key);
        T* const to_key = row_of<T>(a.grad_key, head.b, head.h, key);
        T* const to_value = row_of<T>(a.grad_value, head.b, head.h, key);
#pragma unroll
        for (int d = 0; d < kColumns / 8; ++d)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int column = first_column + 8 * d + lane % 4 * 2 + e;
                if (column >= a.dim) continue;
                to_key[column] = from_float<T>(kept ? grad_key[d][2 * half + e] * float(a.scale) : 0);
                to_value[column] = from_float<T>(kept ? grad_value[d][2 * half + e] : 0);
            }
    }
}

// ------------------------------------------------------------------------------------------------------------- host

template <class T, int D, bool kPlain>
void grad_query(const AttentionCall& c, const Queue& queue) {
    using Tiles = GradQueryTiles<T, D, kPlain>;
    launch("sgalign's attention backward (query) of " + shape(c.a), attention_grad_query_kernel<T, D, kPlain>,
           c.a.batch * c.a.heads * divide_up(divide_up(c.a.queries, kRows) * query_targets(c), Tiles::kBlockTiles),
           c.splits, Tiles::kThreads, Tiles::kSharedBytes, queue, c);
}

template <class T>
void backward(AttentionCall c, const Queue& queue) {
    c.shared_query = c.a.groups[0].count == 2;
    separate_queries(c.a);
    const int64_t heads = c.a.batch * c.a.heads, rows = heads * c.a.queries;
    launch("sgalign's attention backward (delta) of " + shape(c.a), attention_delta_kernel<T>,
           divide_up(c.a.group_count * rows, kDeltaWarps), 1, kDeltaWarps * kWarp, 0, queue, c);
    with_dim(c.a, [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        using Tiles = GradKeyTiles<T, D>;
        c.plain() ? grad_query<T, D, true>(c, queue) : grad_query<T, D, false>(c, queue);
        if (c.splits > 1)
            launch("sgalign's attention backward (sum) of " + shape(c.a), attention_sum_kernel<T>,
                   divide_up(query_targets(c) * rows * c.a.dim, kSumThreads), 1, kSumThreads, 0, queue, c);
        const int drawn = (c.a.mask_threshold > 0) + (c.a.dropout_threshold > 0);
        launch("sgalign's attention backward (key, value) of " + shape(c.a),
               c.plain() ? attention_grad_key_kernel<T, D, true> : attention_grad_key_kernel<T, D, false>,
               heads * KeyTiles<Tiles::kStrips>::count(c.a.keys), D / Tiles::kColumns, Tiles::kThreads,
               Tiles::kSharedBytes + drawn * Tiles::kDrawnBytes, queue, c);
    });
}

}  // namespace sgalign::cuda
