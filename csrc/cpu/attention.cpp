// Masked attention on the CPU, forward and backward, for one or two softmax branches over the same keys.
//
// The kernels go through the keys in chunks of 256, which 32 Philox calls decide for each query, and through the
// queries in tiles of a few rows. Everything except the softmax is done by one function, multiply(), a matrix product
// that keeps its accumulators in registers. No Lq x Lk tensor is stored. Scores are in units of log2, so the softmax is
// 2^(score - log_sum).
//
// Results do not depend on the number of threads. Each row of the output, and each chunk of key gradients, is computed
// by one task in a fixed order. Where results of several tasks are added, the shape alone decides the split into tasks.
#include "../philox.h"
#include "product.h"

namespace {

using namespace sgalign;

constexpr int kForwardRows = 4 * kTileRows, kBackwardRows = 8 * kTileRows;

// Maximum number of rows in a forward task. All rows of a task use the same packed copy of the keys. They include the
// rows of both branches if each branch has its own query. Tasks get fewer rows if some threads would otherwise be idle.
constexpr int64_t kRowBlock = 384;
// Minimum number of tasks in the backward pass, for any number of threads. There are fewer tasks if there are too few
// chunks of keys.
constexpr int64_t kBackwardTasks = 16;

// Row length of a packed [*, D] matrix, in elements: a whole number of panels, but not a multiple of 512 bytes, because
// rows at such distances share only a few cache sets.
template <class R>
inline int64_t packed_row(int64_t dim) {
    const int64_t row = round_to_panel<R>(dim);
    return row * sizeof(R) % 512 ? row : row + kPanel<R>;
}

template <class T>
inline T* row_of(const Matrix& m, int64_t b, int64_t h, int64_t row) {
    return (T*)m.data + b * m.batch + h * m.head + row * m.row;
}

// ------------------------------------------------------------------------------------------------------ masks

struct MaskBits {
    uint32_t lane[kMaskLanes];
};

inline bool is_dropped(const MaskBits& bits, int64_t key) { return bits.lane[key % 32] >> (key / 32) & 1; }

// Add the random mask of one row of a chunk to `bits`. The numbers are drawn in registers, where each 64-bit lane holds
// one 32-bit word of one Philox call.
void add_random(MaskBits& bits, uint64_t seed, int64_t chunk, int64_t query, int64_t batch_head, uint32_t stream,
                int threshold) {
    using Words = Vector<uint64_t>;
    constexpr int lanes = kVectorBytes / 8;
    // The half of a 64-bit lane that comes first in memory holds an even column.
    constexpr bool big_endian = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__;
    const Words low_half = Words{} + 0xffffffffu;
    Words first_column;
    for (int i = 0; i < lanes; ++i) first_column[i] = uint64_t(kMaskLanes * chunk + 2 * i);
    for (int column = 0; column < kMaskLanes; column += 2 * lanes) {
        Words words[2][4];  // even and odd columns
        for (int odd = 0; odd < 2; ++odd) {
            Words c0 = first_column + uint64_t(column + odd), c1 = Words{} + uint64_t(query),
                  c2 = Words{} + uint64_t(batch_head), c3 = Words{} + uint64_t(stream);
            uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
            for (int round = 0; round < kPhiloxRounds; ++round) {
                const Words product0 = multiply_words(c0, Words{} + kPhiloxMultiplier0);
                const Words product1 = multiply_words(c2, Words{} + kPhiloxMultiplier1);
                // The upper halves fill with garbage, which multiply_words and the packing below ignore.
                c0 = (product1 >> 32) ^ c1 ^ (Words{} + key0);
                c2 = (product0 >> 32) ^ c3 ^ (Words{} + key1);
                c1 = product1;
                c3 = product0;
                key0 += kPhiloxWeyl0;
                key1 += kPhiloxWeyl1;
            }
            words[odd][0] = c0;
            words[odd][1] = c1;
            words[odd][2] = c2;
            words[odd][3] = c3;
        }
        using Lanes = Vector<int32_t>;
        Lanes dropped;
        memcpy(&dropped, bits.lane + column, sizeof dropped);
        for (int word = 0; word < 4; ++word) {
            const auto both = (Vector<uint32_t>)((words[big_endian][word] & low_half) | words[!big_endian][word] << 32);
            dropped |= ((Lanes)(both & 0xffffu) < threshold) & (1 << 2 * word);
            dropped |= ((Lanes)(both >> 16) < threshold) & (2 << 2 * word);
        }
        memcpy(bits.lane + column, &dropped, sizeof dropped);
    }
}

// Add keys [first, first + count) of a boolean row to `bits`. A non-zero byte means dropped.
inline void add_bytes(MaskBits& bits, const uint8_t* row, int64_t stride, int64_t first, int64_t count) {
    row += first * stride;
    if (stride == 1 && count == kChunk) {
        for (int group = 0; group < kMaskGroups; ++group)
            for (int lane = 0; lane < kMaskLanes; ++lane)
                bits.lane[lane] |= uint32_t(row[group * kMaskLanes + lane] != 0) << group;
        return;
    }
    for (int64_t k = 0; k < count; ++k) bits.lane[k % 32] |= uint32_t(row[k * stride] != 0) << (k / 32);
}

// Set `bits` to the keys that a chunk drops in every row: padding, and the columns that fill the last panel. Return
// false if there are certainly none.
template <class R>
bool chunk_bits(const Attention& a, int64_t b, int64_t first, int64_t count, MaskBits& bits) {
    bits = {};
    if (a.key_padding)
        add_bytes(bits, a.key_padding + b * a.key_padding_strides[0], a.key_padding_strides[1], first, count);
    for (int64_t k = count; k < round_to_panel<R>(count); ++k) bits.lane[k % 32] |= 1u << (k / 32);
    return a.key_padding || count % kPanel<R>;
}

struct RowMasks {
    MaskBits shared, random, dropout;
    bool any_shared, any_random, any_dropout;
};

// Compute the masks of one row of one chunk. `random` includes `shared`.
inline void row_masks(const Attention& a, int64_t b, int64_t h, int64_t query, int64_t first, int64_t count,
                      const MaskBits& chunk, bool any_chunk, bool wants_random, RowMasks& masks) {
    const int64_t chunk_index = first / kChunk, batch_head = b * a.heads + h;
    masks.any_shared = any_chunk || a.mask;
    if (masks.any_shared) masks.shared = chunk;
    if (a.mask)
        add_bytes(masks.shared, a.mask + b * a.mask_strides[0] + h * a.mask_strides[1] + query * a.mask_strides[2],
                  a.mask_strides[3], first, count);
    masks.any_random = wants_random && a.mask_threshold > 0;
    if (masks.any_random) {
        masks.random = masks.any_shared ? masks.shared : MaskBits{};
        add_random(masks.random, a.seed, chunk_index, query, batch_head, a.stream, a.mask_threshold);
    }
    masks.any_dropout = a.dropout_threshold > 0;
    if (masks.any_dropout) {
        masks.dropout = {};
        add_random(masks.dropout, a.seed, chunk_index, query, batch_head, a.stream | kDropoutStreamBit,
                   a.dropout_threshold);
    }
}

template <class R>
inline R dropout_scale(const Attention& a) {
    return a.dropout_threshold < 65536 ? R(65536.0 / (65536 - a.dropout_threshold)) : R(0);
}

// Return a vector whose elements have all bits set for dropped keys and are 0 for the others. The vector covers the
// keys of `group` from mask lane `lane` on.
template <class R>
inline Vector<typename Real<R>::Int> dropped_lanes(const MaskBits& bits, int lane, int group) {
    typedef uint32_t Narrow __attribute__((vector_size(4 * Real<R>::lanes)));
    Narrow narrow;
    memcpy(&narrow, bits.lane + lane, sizeof narrow);
    const auto wide = __builtin_convertvector(narrow, Vector<typename Real<R>::Int>);
    return (wide & (typename Real<R>::Int(1) << group)) != 0;
}

template <class R>
inline void apply_dropout(R* row, int64_t columns, const MaskBits& bits, R scale) {
    for (int64_t i = 0; i < columns; i += Real<R>::lanes) {
        const auto dropped = dropped_lanes<R>(bits, i % kMaskLanes, i / kMaskLanes);
        store<R>(row + i, dropped ? Vector<R>{} : load(row + i) * scale);
    }
}

// ---------------------------------------------------------------------------------------------------- packing

// Pack a [count, D] matrix with any row stride into rows of `packed_row` elements, times `factor`. Dropped rows become
// zeros, because their content times a weight of 0 could be NaN.
template <class T, class R>
void pack_rows(const T* source, int64_t stride, int64_t count, int64_t dim, R factor, const MaskBits* dropped, R* out) {
    const int64_t row = packed_row<R>(dim);
    for (int64_t i = 0; i < count; ++i, out += row) {
        const bool zero = dropped && is_dropped(*dropped, i);
        for (int64_t d = 0; d < dim; ++d) out[d] = zero ? R(0) : Storage<T>::read(source[i * stride + d]) * factor;
        for (int64_t d = dim; d < row; ++d) out[d] = 0;
    }
}

// Transpose packed rows into panels of kPanel rows: [panel][D][kPanel].
template <class R>
void transpose_rows(const R* rows, int64_t count, int64_t dim, R* out) {
    const int64_t row = packed_row<R>(dim);
    for (int64_t first = 0; first < count; first += kPanel<R>, out += dim * kPanel<R>)
        for (int64_t d = 0; d < dim; ++d)
            for (int64_t i = 0; i < kPanel<R>; ++i)
                out[d * kPanel<R> + i] = first + i < count ? rows[(first + i) * row + d] : R(0);
}

// ---------------------------------------------------------------------------------------------------- forward

// One step of the online softmax. The scores in `row` become 2^(score - top). If they raise the maximum `top`, the sums
// and the output rows are rescaled to it.
template <class R>
void softmax_row(R* row, int64_t columns, const MaskBits* dropped, R& top, R& sum, R* out[], R* sums[], int branches,
                 int64_t out_columns) {
    constexpr R infinity = __builtin_inf();
    Vector<R> largest = broadcast(-infinity);
    for (int64_t i = 0; i < columns; i += Real<R>::lanes) {
        Vector<R> scores = load(row + i);
        if (dropped) {
            scores = dropped_lanes<R>(*dropped, i % kMaskLanes, i / kMaskLanes) ? broadcast(-infinity) : scores;
            store<R>(row + i, scores);
        }
        largest = scores > largest ? scores : largest;
    }
    const R chunk_top = largest_lane<R>(largest);
    if (chunk_top > top) {
        const bool first = top == -infinity;
        const R rescale = first ? R(0) : exp2_scalar(top - chunk_top);
        top = chunk_top;
        if (first) branches = 0;  // nothing to rescale yet
        sum *= rescale;
        for (int branch = 0; branch < branches; ++branch) {
            if (sums[branch] != &sum) *sums[branch] *= rescale;
            for (int64_t d = 0; d < out_columns; d += Real<R>::lanes)
                store<R>(out[branch] + d, load(out[branch] + d) * rescale);
        }
    }
    const R shift = top == -infinity ? R(0) : top;
    Vector<R> total{};
    for (int64_t i = 0; i < columns; i += Real<R>::lanes) {
        const Vector<R> weights = exp2<R>(load(row + i) - shift);
        total += weights;
        store<R>(row + i, weights);
    }
    sum += sum_lanes<R>(total);
}

// Write the weights of the mirrored branch to `out` and return their sum. They are the supervised weights, with 0 for
// the dropped entries.
template <class R>
R copy_kept(const R* row, int64_t columns, const MaskBits& dropped, R* out) {
    Vector<R> total{};
    for (int64_t i = 0; i < columns; i += Real<R>::lanes) {
        const auto lanes = dropped_lanes<R>(dropped, i % kMaskLanes, i / kMaskLanes);
        const Vector<R> weights = lanes ? Vector<R>{} : load(row + i);
        total += weights;
        store<R>(out + i, weights);
    }
    return sum_lanes<R>(total);
}

template <class R>
struct ForwardScratch {
    R *query, *out[2], *top, *sum[2], *key, *key_panels, *value, *weights[2];
    int64_t* rows;

    static int64_t bytes(int64_t dim) {
        const int64_t row = packed_row<R>(dim);
        return sizeof(R) * (kRowBlock * (3 * row + 3) + kChunk * 3 * row + 2 * kForwardRows * kChunk) + 8 * kRowBlock +
               64 * 12;
    }
    ForwardScratch(char* cursor, int64_t dim) {
        const int64_t row = packed_row<R>(dim);
        query = take<R>(cursor, kRowBlock * row);
        top = take<R>(cursor, kRowBlock);
        for (int i = 0; i < 2; ++i) {
            out[i] = take<R>(cursor, kRowBlock * row);
            sum[i] = take<R>(cursor, kRowBlock);
            weights[i] = take<R>(cursor, kForwardRows * kChunk);
        }
        key = take<R>(cursor, kChunk * row);
        key_panels = take<R>(cursor, kChunk * row);
        value = take<R>(cursor, kChunk * row);
        rows = take<int64_t>(cursor, kRowBlock);
    }
};

// Compute the output and the log_sum of some rows, for `count` branches of each group. `rows` holds indices into the
// rows of all groups, one group after the other.
template <class T, class R = typename Storage<T>::R>
void forward_rows(const Attention& a, int64_t b, int64_t h, int first_branch, int count, const int64_t* rows,
                  int64_t row_count, const ForwardScratch<R>& s) {
    const int64_t row = packed_row<R>(a.dim), dim = round_to_panel<R>(a.dim);
    constexpr R infinity = __builtin_inf();
    for (int64_t i = 0; i < row_count; ++i) {
        const T* query = row_of<const T>(a.groups[rows[i] / a.queries].query, b, h, rows[i] % a.queries);
        pack_rows(query, 0, 1, a.dim, R(a.scale * kLog2e), nullptr, s.query + i * row);
        s.top[i] = -infinity;
        for (int branch = 0; branch < count; ++branch) {
            s.sum[branch][i] = 0;
            memset(s.out[branch] + i * row, 0, sizeof(R) * row);
        }
    }
    for (int64_t first = 0; first < a.keys; first += kChunk) {
        const int64_t keys = smaller(kChunk, a.keys - first), columns = round_to_panel<R>(keys);
        MaskBits chunk;
        const bool any_chunk = chunk_bits<R>(a, b, first, keys, chunk);
        const MaskBits* padding = a.key_padding ? &chunk : nullptr;
        pack_rows(row_of<const T>(a.key, b, h, first), a.key.row, keys, a.dim, R(1), padding, s.key);
        transpose_rows(s.key, keys, a.dim, s.key_panels);
        pack_rows(row_of<const T>(a.value, b, h, first), a.value.row, keys, a.dim, R(1), padding, s.value);
        for (int64_t start = 0; start < row_count; start += kForwardRows) {
            const int64_t tile_rows = smaller(kForwardRows, row_count - start);
            multiply<R, false>(tile_rows, columns, a.dim, {s.query + start * row, row, 1},
                               {s.key_panels, kPanel<R>, a.dim * kPanel<R>}, s.weights[0], kChunk);
            for (int64_t i = 0; i < tile_rows; ++i) {
                const int64_t at = start + i;
                R* weights = s.weights[0] + i * kChunk;
                const Branch& last = a.groups[rows[at] / a.queries].branches[first_branch + count - 1];
                RowMasks masks;
                row_masks(a, b, h, rows[at] % a.queries, first, keys, chunk, any_chunk, last.random, masks);
                const MaskBits* shared = masks.any_shared ? &masks.shared : nullptr;
                R* out[2] = {s.out[0] + at * row, s.out[1] + at * row};
                R* sums[2] = {s.sum[0] + at, s.sum[1] + at};
                const bool alone_random = count == 1 && masks.any_random;
                softmax_row<R>(weights, columns, alone_random ? &masks.random : shared, s.top[at], s.sum[0][at], out,
                               sums, count, dim);
                if (count == 2) {
                    R* mirrored = s.weights[1] + i * kChunk;
                    if (!masks.any_random) masks.random = masks.any_shared ? masks.shared : MaskBits{};
                    s.sum[1][at] += copy_kept(weights, columns, masks.random, mirrored);
                    if (masks.any_dropout) apply_dropout(mirrored, columns, masks.dropout, dropout_scale<R>(a));
                }
                if (masks.any_dropout) apply_dropout(weights, columns, masks.dropout, dropout_scale<R>(a));
            }
            for (int branch = 0; branch < count; ++branch)
                multiply<R, true>(tile_rows, dim, keys, {s.weights[branch], kChunk, 1}, {s.value, row, kPanel<R>},
                                  s.out[branch] + start * row, row);
        }
    }
    for (int branch = 0; branch < count; ++branch)
        for (int64_t i = 0; i < row_count; ++i) {
            const Branch& target = a.groups[rows[i] / a.queries].branches[first_branch + branch];
            const int64_t query = rows[i] % a.queries;
            const R sum = s.sum[branch][i], inverse = sum == 0 ? R(0) : 1 / sum;
            T* out = row_of<T>(target.out, b, h, query);
            for (int64_t d = 0; d < a.dim; ++d) out[d] = Storage<T>::write(s.out[branch][i * row + d] * inverse);
            R* log_sum = (R*)target.log_sum + (b * a.heads + h) * a.queries + query;
            *log_sum = sum == 0 ? infinity : s.top[i] + log2_scalar(sum);
        }
}

template <class T>
void forward(const Attention& a) {
    using R = typename Storage<T>::R;
    // The weights of the mirrored branch are relative to the supervised maximum. If that branch drops nearly all of a
    // row's weight, small products underflow and log_sum loses digits. Rows whose sum is below `smallest_sum` are
    // therefore computed again.
    constexpr R smallest_sum = 0x1p-12;
    const int64_t heads = a.batch * a.heads, rows = a.group_count * a.queries;
    const int branches = a.groups[0].count;
    int64_t block = kRowBlock;
    while (block > kForwardRows && heads * divide_up(rows, block) < 4 * a.threads) block /= 2;
    const int64_t blocks = divide_up(rows, block);
    const Scratch scratch(a.threads, ForwardScratch<R>::bytes(a.dim));
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t task = 0; task < heads * blocks; ++task) {
        const ForwardScratch<R> s(scratch.of_thread(thread_index()), a.dim);
        const int64_t b = task / blocks / a.heads, h = task / blocks % a.heads;
        const int64_t first = task % blocks * block, count = smaller(block, rows - first);
        for (int64_t i = 0; i < count; ++i) s.rows[i] = first + i;
        forward_rows<T>(a, b, h, 0, branches, s.rows, count, s);
        if (branches == 2) {
            int64_t again = 0;
            for (int64_t i = 0; i < count; ++i)
                if (!(s.sum[1][i] >= smallest_sum)) s.rows[again++] = first + i;
            if (again) forward_rows<T>(a, b, h, 1, 1, s.rows, again, s);
        }
    }
}

// --------------------------------------------------------------------------------------------------- backward

template <class R>
struct BackwardScratch {
    R *query[2], *grad_out[2][2], *delta[2][2], *key, *key_panels, *value, *value_panels, *grad_key, *grad_value;
    R *scores, *weights, *grad_weights, *grad_scores;
    RowMasks* masks;

    static int64_t bytes(const Attention& a) {
        const int64_t row = packed_row<R>(a.dim);
        // at most two queries and two branches in total
        return sizeof(R) * (a.queries * (4 * row + 2) + kChunk * 6 * row + 4 * kBackwardRows * kChunk) +
               sizeof(RowMasks) * kBackwardRows + 64 * 24;
    }
    BackwardScratch(char* cursor, const Attention& a) {
        const int64_t row = packed_row<R>(a.dim);
        for (int g = 0; g < a.group_count; ++g) {
            query[g] = take<R>(cursor, a.queries * row);
            for (int branch = 0; branch < a.groups[g].count; ++branch) {
                grad_out[g][branch] = take<R>(cursor, a.queries * row);
                delta[g][branch] = take<R>(cursor, a.queries);
            }
        }
        R** const chunks[] = {&key, &key_panels, &value, &value_panels, &grad_key, &grad_value};
        for (R** chunk : chunks) *chunk = take<R>(cursor, kChunk * row);
        R** const tiles[] = {&scores, &weights, &grad_weights, &grad_scores};
        for (R** tile : tiles) *tile = take<R>(cursor, kBackwardRows * kChunk);
        masks = take<RowMasks>(cursor, kBackwardRows);
    }
};

// Compute P after dropout (in `weights`) and dS from scores and dP. If `accumulate`, add dS to `grad_scores`, otherwise
// write it there.
template <class R>
void softmax_backward_row(const R* scores, const R* grad_weights, int64_t columns, R log_sum, R delta,
                          const MaskBits* dropped, const MaskBits* dropout, R scale, R* weights, R* grad_scores,
                          bool accumulate) {
    for (int64_t i = 0; i < columns; i += Real<R>::lanes) {
        Vector<R> p = exp2<R>(load(scores + i) - log_sum), dp = load(grad_weights + i);
        if (dropped) p = dropped_lanes<R>(*dropped, i % kMaskLanes, i / kMaskLanes) ? Vector<R>{} : p;
        Vector<R> kept = p;
        if (dropout) {
            const auto lanes = dropped_lanes<R>(*dropout, i % kMaskLanes, i / kMaskLanes);
            kept = lanes ? Vector<R>{} : p * scale;
            dp = lanes ? Vector<R>{} : dp * scale;
        }
        store<R>(weights + i, kept);
        const Vector<R> ds = p * (dp - delta);
        store<R>(grad_scores + i, accumulate ? load(grad_scores + i) + ds : ds);
    }
}

// Process one chunk of keys with every query. This computes dK and dV of the chunk, and the chunk's share of dQ.
template <class T, class R = typename Storage<T>::R>
void backward_chunk(const Attention& a, int64_t b, int64_t h, int64_t first, R* const* grad_query,
                    const BackwardScratch<R>& s) {
    const int64_t row = packed_row<R>(a.dim), dim = round_to_panel<R>(a.dim);
    const int64_t keys = smaller(kChunk, a.keys - first), columns = round_to_panel<R>(keys);
    MaskBits chunk;
    const bool any_chunk = chunk_bits<R>(a, b, first, keys, chunk);
    const MaskBits* padding = a.key_padding ? &chunk : nullptr;
    pack_rows(row_of<const T>(a.key, b, h, first), a.key.row, keys, a.dim, R(1), padding, s.key);
    pack_rows(row_of<const T>(a.value, b, h, first), a.value.row, keys, a.dim, R(1), padding, s.value);
    transpose_rows(s.key, keys, a.dim, s.key_panels);
    transpose_rows(s.value, keys, a.dim, s.value_panels);
    memset(s.grad_key, 0, sizeof(R) * keys * row);
    memset(s.grad_value, 0, sizeof(R) * keys * row);
    for (int g = 0; g < a.group_count; ++g) {
        const QueryGroup& group = a.groups[g];
        for (int64_t start = 0; start < a.queries; start += kBackwardRows) {
            const int64_t rows = smaller(kBackwardRows, a.queries - start);
            const R* query = s.query[g] + start * row;
            multiply<R, false>(rows, columns, a.dim, {query, row, 1}, {s.key_panels, kPanel<R>, a.dim * kPanel<R>},
                               s.scores, kChunk);
            for (int64_t i = 0; i < rows; ++i)
                row_masks(a, b, h, start + i, first, keys, chunk, any_chunk, group.branches[group.count - 1].random,
                          s.masks[i]);
            for (int branch = 0; branch < group.count; ++branch) {
                const R* grad_out = s.grad_out[g][branch] + start * row;
                const R* log_sum = (const R*)group.branches[branch].log_sum + (b * a.heads + h) * a.queries + start;
                multiply<R, false>(rows, columns, a.dim, {grad_out, row, 1},
                                   {s.value_panels, kPanel<R>, a.dim * kPanel<R>}, s.grad_weights, kChunk);
                for (int64_t i = 0; i < rows; ++i) {
                    const RowMasks& masks = s.masks[i];
                    const bool random = group.branches[branch].random && masks.any_random;
                    const MaskBits* dropped = random ? &masks.random : (masks.any_shared ? &masks.shared : nullptr);
                    softmax_backward_row<R>(s.scores + i * kChunk, s.grad_weights + i * kChunk, columns, log_sum[i],
                                            s.delta[g][branch][start + i], dropped,
                                            masks.any_dropout ? &masks.dropout : nullptr, dropout_scale<R>(a),
                                            s.weights + i * kChunk, s.grad_scores + i * kChunk, branch > 0);
                }
                multiply<R, true>(keys, dim, rows, {s.weights, 1, kChunk}, {grad_out, row, kPanel<R>}, s.grad_value,
                                  row);
            }
            multiply<R, true>(rows, dim, keys, {s.grad_scores, kChunk, 1}, {s.key, row, kPanel<R>},
                              grad_query[g] + start * row, row);
            multiply<R, true>(keys, dim, rows, {s.grad_scores, 1, kChunk}, {query, row, kPanel<R>}, s.grad_key, row);
        }
    }
    for (int64_t k = 0; k < keys; ++k) {
        T* grad_key = row_of<T>(a.grad_key, b, h, first + k);
        T* grad_value = row_of<T>(a.grad_value, b, h, first + k);
        for (int64_t d = 0; d < a.dim; ++d) {
            // The packed queries include the factor scale * log2(e). dK needs only the scale.
            grad_key[d] = Storage<T>::write(s.grad_key[k * row + d] * R(kLn2));
            grad_value[d] = Storage<T>::write(s.grad_value[k * row + d]);
        }
    }
}

template <class T>
void backward(const Attention& a) {
    using R = typename Storage<T>::R;
    const int64_t row = packed_row<R>(a.dim), heads = a.batch * a.heads, chunks = divide_up(a.keys, kChunk);
    // There may be billions of heads if all results are empty.
    if (heads == 0 || a.dim == 0 || a.queries + a.keys == 0) return;
    // Each task sums dQ over its chunks in a separate matrix. These matrices are added in a fixed order afterwards.
    const int64_t splits = chunks ? smaller(chunks, divide_up(kBackwardTasks, heads)) : 1;
    const int64_t partial = a.queries * row;
    const Scratch scratch(a.threads, BackwardScratch<R>::bytes(a));
    const Scratch partials(1, heads * a.group_count * splits * partial * int64_t(sizeof(R)) + 64);
    char* cursor = partials.of_thread(0);
    R* const all_partials = take<R>(cursor, heads * a.group_count * splits * partial);  // [head][group][split]
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t task = 0; task < heads * splits; ++task) {
        const BackwardScratch<R> s(scratch.of_thread(thread_index()), a);
        const int64_t head = task / splits, split = task % splits, b = head / a.heads, h = head % a.heads;
        R* grad_query[2] = {};
        for (int g = 0; g < a.group_count; ++g) {
            const QueryGroup& group = a.groups[g];
            grad_query[g] = all_partials + ((head * a.group_count + g) * splits + split) * partial;
            memset(grad_query[g], 0, sizeof(R) * partial);
            pack_rows(row_of<const T>(group.query, b, h, 0), group.query.row, a.queries, a.dim, R(a.scale * kLog2e),
                      nullptr, s.query[g]);
            for (int branch = 0; branch < group.count; ++branch) {
                const Matrix &out = group.branches[branch].out, &grad_out = group.branches[branch].grad_out;
                pack_rows(row_of<const T>(grad_out, b, h, 0), grad_out.row, a.queries, a.dim, R(1), nullptr,
                          s.grad_out[g][branch]);
                for (int64_t i = 0; i < a.queries; ++i) {
                    // sum_k P dP = sum_d O dO, with or without dropout
                    pack_rows(row_of<const T>(out, b, h, i), 0, 1, a.dim, R(1), nullptr, s.key);
                    Vector<R> delta{};
                    for (int64_t d = 0; d < row; d += Real<R>::lanes)
                        delta += load(s.key + d) * load(s.grad_out[g][branch] + i * row + d);
                    s.delta[g][branch][i] = sum_lanes<R>(delta);
                }
            }
        }
        for (int64_t chunk = chunks * split / splits; chunk < chunks * (split + 1) / splits; ++chunk)
            backward_chunk<T>(a, b, h, chunk * kChunk, grad_query, s);
    }
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t head = 0; head < heads; ++head)
        for (int g = 0; g < a.group_count; ++g)
            for (int64_t i = 0; i < a.queries; ++i) {
                R* sum = all_partials + (head * a.group_count + g) * splits * partial + i * row;
                for (int64_t split = 1; split < splits; ++split)
                    for (int64_t d = 0; d < a.dim; ++d) sum[d] += sum[split * partial + d];
                T* out = row_of<T>(a.groups[g].grad_query, head / a.heads, head % a.heads, i);
                for (int64_t d = 0; d < a.dim; ++d) out[d] = Storage<T>::write(sum[d] * R(a.scale));
            }
}

// ------------------------------------------------------------------------------------------------ entry points

void attention_forward(const Attention& a) {
    with_type(a.dtype, [&](auto zero) { forward<decltype(zero)>(a); });
}

void attention_backward(const Attention& a) {
    with_type(a.dtype, [&](auto zero) { backward<decltype(zero)>(a); });
}

void random_mask(const RandomMask& m) {
    const int64_t rows = m.batch_heads * m.queries;
#pragma omp parallel for schedule(static) num_threads(m.threads)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t first = 0; first < m.keys; first += kChunk) {
            MaskBits bits{};
            add_random(bits, m.seed, first / kChunk, row % m.queries, row / m.queries, m.stream, m.threshold);
            uint8_t* out = m.out + row * m.keys + first;
            for (int64_t k = 0; k < smaller(kChunk, m.keys - first); ++k) out[k] = is_dropped(bits, k);
        }
}

}  // namespace

namespace sgalign {
extern const AttentionKernels SGALIGN_KERNELS;  // for example attention_avx2
const AttentionKernels SGALIGN_KERNELS = {attention_forward, attention_backward, random_mask};
}  // namespace sgalign
