// The relation head on a GPU: logits of R pairs of N objects, forward and backward, for one or both branches.
//
// The matrix (subject + object) * union, which is multiplied by the weights, has size R x C, as does its gradient. Both
// are computed one tile at a time. The gradients of subject and object are sums over the pairs of an object. For one of
// the two, each block owns some channels. It goes through the pairs sorted by subject or by object, and adds their
// contributions one after the other. This needs no atomics and no merging.
#include <algorithm>

#include "fragments.cuh"
#include "launch.cuh"

namespace sgalign::cuda {

namespace {

struct RelationCall {
    RelationLogits a;
    const int64_t* orders;
    float* workspace;
    int splits;
    bool aligned;
};

constexpr int kRelations = 64, kClasses = 64;  // size of a tile; a warp computes 16 rows of it
constexpr int kWarps = 4, kThreads = kWarps * kWarp;
template <class T>
constexpr int kChannels = 128 / sizeof(T);

template <class T>
struct alignas(16) Piece {
    T elements[16 / sizeof(T)];
};

// Load up to 16 bytes of a row of global memory. Elements from `count` on are zeros.
template <class T>
__device__ __forceinline__ Piece<T> load_piece(const T* row, int count, bool aligned) {
    constexpr int kPiece = 16 / sizeof(T);
    if (aligned && count == kPiece) return *(const Piece<T>*)row;
    Piece<T> piece{};
    for (int e = 0; e < kPiece; ++e)
        if (e < count) piece.elements[e] = row[e];
    return piece;
}

__device__ __forceinline__ int smaller(int64_t a, int64_t b) { return int(a < b ? a : b); }

// Start copying a tile of a matrix with `rows` rows and `columns` columns. The tile begins at (first_row,
// first_column).
template <int kTileRows, class T, int D>
__device__ __forceinline__ void load_part(Tile<T, D> to, const void* matrix, int64_t stride, int64_t first_row,
                                          int64_t rows, int64_t first_column, int64_t columns, bool aligned) {
    load_tile<kTileRows, kThreads>(to, smaller(D, columns - first_column), aligned, [&](int row) {
        return Row<T>{(const T*)matrix + (first_row + row) * stride + first_column, first_row + row < rows};
    });
}

// Return (subject + object) * union for the channels of one relation that fill 16 bytes.
template <class T>
__device__ __forceinline__ Piece<T> product_piece(const RelationCall& c, const RelationBranch& branch, int64_t relation,
                                                  int64_t channel, const Piece<T>& union_) {
    constexpr int kPiece = 16 / sizeof(T);
    const int count = smaller(kPiece, c.a.channels - channel);
    Piece<T> result{};
    if (relation >= c.a.relations || count <= 0) return result;
    const int64_t* pair = c.a.pairs + 2 * relation;
    const T* const subject_row = (const T*)branch.subject + pair[0] * branch.subject_row + channel;
    const T* const object_row = (const T*)branch.object + pair[1] * branch.object_row + channel;
    const Piece<T> subject = load_piece(subject_row, count, c.aligned),
                   object = load_piece(object_row, count, c.aligned);
#pragma unroll
    for (int e = 0; e < kPiece; ++e)
        result.elements[e] = from_float<T>((to_float(subject.elements[e]) + to_float(object.elements[e])) *
                                           to_float(union_.elements[e]));
    return result;
}

// ---------------------------------------------------------------------------------------------------------- forward

template <class T>
constexpr int kForwardBytes = (2 * kRelations + 2 * 2 * kClasses + 2 * kRelations) * 128;

// Compute the logits of a tile of relations and classes. The block sums only over the part of the channels with index
// block_index_y().
template <class T, int kBranches>
__global__ void __launch_bounds__(kThreads) relation_forward_kernel(const __grid_constant__ RelationCall c) {
    constexpr int D = kChannels<T>, kTile = kRelations * D, kPiece = 16 / sizeof(T);
    const RelationLogits& a = c.a;
    const int class_tiles = int(divide_up(a.classes, kClasses));
    const int64_t first = block_index() / class_tiles * kRelations,
                  first_class = block_index() % class_tiles * kClasses;
    const int warp = warp_index(), lane = lane_index();
    T* const unions = (T*)shared_memory();
    T* const weights = unions + 2 * kTile;
    T* const products = weights + 2 * kBranches * kTile;
    const auto load = [&](int tile, int stage) {
        const int64_t channel = int64_t(tile) * D;
        load_part<kRelations>(Tile<T, D>{unions + stage * kTile}, a.union_, a.union_row, first, a.relations, channel,
                              a.channels, c.aligned);
        for (int b = 0; b < kBranches; ++b)
            load_part<kClasses>(Tile<T, D>{weights + (stage * kBranches + b) * kTile}, a.branches[b].weight,
                                a.branches[b].weight_row, first_class, a.classes, channel, a.channels, c.aligned);
    };
    const int64_t tiles = divide_up(a.channels, D);
    const int begin = int(tiles * block_index_y() / c.splits), end = int(tiles * (block_index_y() + 1) / c.splits);
    if (begin < end) load(begin, 0);
    float logits[kBranches][kClasses / 8][4] = {};
    for (int tile = begin; tile < end; ++tile) {
        const int stage = (tile - begin) & 1;
        copies_wait();
        sync_block();
        if (tile + 1 < end) load(tile + 1, stage ^ 1);
        // Each warp computes the rows of products that it needs.
        const Tile<T, D> union_tile{unions + stage * kTile};
        for (int i = lane; i < 16 * Tile<T, D>::kPieces; i += kWarp) {
            const int row = 16 * warp + i / Tile<T, D>::kPieces, column = i % Tile<T, D>::kPieces * kPiece;
            const Piece<T> piece = shared_load((const Piece<T>*)union_tile.at(row, column));
#pragma unroll
            for (int b = 0; b < kBranches; ++b)
                shared_store((Piece<T>*)Tile<T, D>{products + b * kTile}.at(row, column),
                             product_piece(c, a.branches[b], first + row, int64_t(tile) * D + column, piece));
        }
        sync_warp();
#pragma unroll
        for (int b = 0; b < kBranches; ++b)
#pragma unroll
            for (int k = 0; k < D; k += kDepth<T>) {
                const OperandA<T> left = load_a(Tile<T, D>{products + b * kTile}, 16 * warp, k);
#pragma unroll
                for (int n = 0; n < kClasses / 8; n += 2) {
                    OperandB<T> right[2];
                    load_b(Tile<T, D>{weights + (stage * kBranches + b) * kTile}, 8 * n, k, right);
                    multiply(logits[b][n], left, right[0]);
                    multiply(logits[b][n + 1], left, right[1]);
                }
            }
    }
    const int64_t size = a.relations * a.classes;
#pragma unroll
    for (int b = 0; b < kBranches; ++b)
#pragma unroll
        for (int n = 0; n < kClasses / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int64_t row = first + 16 * warp + lane / 4 + e / 2 * 8;
                const int64_t column = first_class + 8 * n + lane % 4 * 2 + e % 2;
                if (row < a.relations && column < a.classes)
                    c.workspace[(block_index_y() * kBranches + b) * size + row * a.classes + column] = logits[b][n][e];
            }
}

// Sum the parts of the logits and add the bias.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) relation_merge_kernel(const __grid_constant__ RelationCall c) {
    const int64_t size = c.a.relations * c.a.classes;
    const int64_t i = int64_t(block_index()) * kThreads + thread_index();
    if (i >= c.a.count * size) return;
    const RelationBranch& branch = c.a.branches[i / size];
    float sum = branch.bias ? to_float(((const T*)branch.bias)[i % size % c.a.classes]) : 0;
    for (int split = 0; split < c.splits; ++split) sum += c.workspace[split * c.a.count * size + i];
    ((T*)branch.logits)[i % size] = from_float<T>(sum);
}

// --------------------------------------------------------------------------------------------------------- backward

// Compute the gradient of a tile of products. It is the product of rows relation_of(0), relation_of(1), ... of
// grad_logits and some columns (channels) of the weights. Each warp computes 16 rows. When this returns, the tiles may
// be overwritten.
template <class T, class RelationOf>
__device__ __forceinline__ void grad_products(const RelationCall& c, const RelationBranch& branch, int64_t channel,
                                              RelationOf relation_of, Tile<T, kClasses> grads,
                                              Tile<T, kChannels<T>> weights, float (&out)[kChannels<T> / 8][4]) {
    const RelationLogits& a = c.a;
#pragma unroll
    for (int n = 0; n < kChannels<T> / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[n][e] = 0;
    for (int64_t first_class = 0; first_class < a.classes; first_class += kClasses) {
        load_tile<kRelations, kThreads>(grads, smaller(kClasses, a.classes - first_class), false, [&](int row) {
            const int64_t relation = relation_of(row);
            const bool inside = relation >= 0;
            return Row<T>{(const T*)branch.grad_logits + (inside ? relation : 0) * a.classes + first_class, inside};
        });
        load_part<kClasses>(weights, branch.weight, branch.weight_row, first_class, a.classes, channel, a.channels,
                            c.aligned);
        copies_wait();
        sync_block();
#pragma unroll
        for (int k = 0; k < kClasses; k += kDepth<T>) {
            const OperandA<T> left = load_a(grads, 16 * warp_index(), k);
#pragma unroll
            for (int n = 0; n < kChannels<T> / 8; n += 2) {
                OperandB<T> right[2];
                load_b_transposed(weights, k, 8 * n, right);
                multiply(out[n], left, right[0]);
                multiply(out[n + 1], left, right[1]);
            }
        }
        sync_block();
    }
}

template <class T>
constexpr int kGradTiles = (kRelations * kClasses + kClasses * kChannels<T>)*int(sizeof(T));

// Compute the gradient of union. Each block computes a tile of relations and channels.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) relation_grad_union_kernel(const __grid_constant__ RelationCall c) {
    constexpr int D = kChannels<T>;
    const RelationLogits& a = c.a;
    const int channel_tiles = int(divide_up(a.channels, D));
    const int64_t first = block_index() / channel_tiles * kRelations, channel = block_index() % channel_tiles * D;
    const Tile<T, kClasses> grads{(T*)shared_memory()};
    const Tile<T, D> weights{grads.data + kRelations * kClasses};
    const int row = 16 * warp_index() + lane_index() / 4, column = lane_index() % 4 * 2;
    float grad_union[D / 8][4] = {};
    for (int b = 0; b < a.count; ++b) {
        const RelationBranch& branch = a.branches[b];
        float products[D / 8][4];
        grad_products<T>(
            c, branch, channel, [&](int row) { return first + row < a.relations ? first + row : -1; }, grads, weights,
            products);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int64_t relation = first + row + e / 2 * 8;
            if (relation >= a.relations) continue;
            const int64_t* const pair = a.pairs + 2 * relation;
            const T* const subject = (const T*)branch.subject + pair[0] * branch.subject_row;
            const T* const object = (const T*)branch.object + pair[1] * branch.object_row;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const int64_t at = channel + 8 * n + column + e % 2;
                if (at < a.channels)
                    grad_union[n][e] += products[n][e] * (to_float(subject[at]) + to_float(object[at]));
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const int64_t relation = first + row + e / 2 * 8, at = channel + 8 * n + column + e % 2;
            if (relation < a.relations && at < a.channels)
                ((T*)a.grad_union)[relation * a.channels + at] = from_float<T>(grad_union[n][e]);
        }
}

template <class T>
constexpr int kEndsBytes = kGradTiles<T> + kRelations * kChannels<T> * 4 + 2 * kRelations * 8;

// Compute the gradient of one end (subject or object) of one branch, for all objects and some channels. block_index_y()
// chooses the end and the branch.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) relation_grad_ends_kernel(const __grid_constant__ RelationCall c) {
    constexpr int D = kChannels<T>;
    const RelationLogits& a = c.a;
    const int end = block_index_y() % 2;
    const RelationBranch& branch = a.branches[block_index_y() / 2];
    const int64_t* const order = c.orders + end * a.relations;
    T* const to = (T*)(end ? branch.grad_object : branch.grad_subject);
    const int64_t channel = int64_t(block_index()) * D;

    const Tile<T, kClasses> grads{(T*)shared_memory()};
    const Tile<T, D> weights{grads.data + kRelations * kClasses};
    float* const products = (float*)(weights.data + kClasses * D);  // [relation][channel]
    int64_t* const relations = (int64_t*)(products + kRelations * D);
    int64_t* const objects = relations + kRelations;
    const int thread = thread_index(), lane = lane_index();

    int64_t object = 0;  // object whose sum is in progress; each channel has one thread
    float sum = 0;
    const auto finish_until = [&](int64_t next) {
        for (; object < next; ++object, sum = 0) to[object * a.channels + channel + thread] = from_float<T>(sum);
    };
    const bool adds = thread < D && channel + thread < a.channels;
    for (int64_t first = 0; first < a.relations; first += kRelations) {
        sync_block();  // the previous tile has been added
        if (thread < kRelations) {
            const int64_t relation = first + thread < a.relations ? order[first + thread] : -1;
            shared_store(relations + thread, relation);
            shared_store(objects + thread, relation < 0 ? -1 : a.pairs[2 * relation + end]);
        }
        sync_block();
        float tile[D / 8][4];
        grad_products<T>(
            c, branch, channel, [&](int row) { return shared_load(relations + row); }, grads, weights, tile);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = 16 * warp_index() + lane / 4 + e / 2 * 8;
            const int64_t relation = shared_load(relations + row);
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const int column = 8 * n + lane % 4 * 2 + e % 2;
                const bool inside = relation >= 0 && channel + column < a.channels;
                const float factor =
                    inside ? to_float(((const T*)a.union_)[relation * a.union_row + channel + column]) : 0;
                shared_store(products + row * D + column, tile[n][e] * factor);
            }
        }
        sync_block();
        if (adds)
            for (int row = 0; row < smaller(kRelations, a.relations - first); ++row) {
                finish_until(shared_load(objects + row));
                sum += shared_load(products + row * D + thread);
            }
    }
    if (adds) finish_until(a.objects);
}

template <class T>
constexpr int kWeightBytes = (kRelations * kClasses + kRelations * kChannels<T>)*int(sizeof(T));

// Compute the gradient of the weights. Each block computes a tile of classes and channels of one branch, and each warp
// 16 classes of it.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) relation_grad_weight_kernel(const __grid_constant__ RelationCall c) {
    constexpr int D = kChannels<T>, kPiece = 16 / sizeof(T);
    const RelationLogits& a = c.a;
    const int64_t channel = int64_t(block_index()) * D, first_class = int64_t(block_index_y() / a.count) * kClasses;
    const RelationBranch& branch = a.branches[block_index_y() % a.count];
    const Tile<T, kClasses> grads{(T*)shared_memory()};
    const Tile<T, D> products{grads.data + kRelations * kClasses};
    float grad_weight[D / 8][4] = {};
    for (int64_t first = 0; first < a.relations; first += kRelations) {
        sync_block();  // the previous tiles have been multiplied
        load_part<kRelations>(grads, branch.grad_logits, a.classes, first, a.relations, first_class, a.classes, false);
        for (int i = thread_index(); i < kRelations * Tile<T, D>::kPieces; i += kThreads) {
            const int row = i / Tile<T, D>::kPieces, column = i % Tile<T, D>::kPieces * kPiece;
            const int64_t relation = first + row, at = channel + column;
            const int count = smaller(kPiece, a.channels - at);
            Piece<T> piece{};
            if (relation < a.relations && count > 0)
                piece = load_piece((const T*)a.union_ + relation * a.union_row + at, count, c.aligned);
            shared_store((Piece<T>*)products.at(row, column), product_piece(c, branch, relation, at, piece));
        }
        sync_block();
#pragma unroll
        for (int k = 0; k < kRelations; k += kDepth<T>) {
            const OperandA<T> left = load_a_transposed(grads, k, 16 * warp_index());
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                OperandB<T> right[2];
                load_b_transposed(products, k, 8 * n, right);
                multiply(grad_weight[n], left, right[0]);
                multiply(grad_weight[n + 1], left, right[1]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int64_t row = first_class + 16 * warp_index() + lane_index() / 4 + e / 2 * 8;
            const int64_t column = channel + 8 * n + lane_index() % 4 * 2 + e % 2;
            if (row < a.classes && column < a.channels)
                ((T*)branch.grad_weight)[row * a.channels + column] = from_float<T>(grad_weight[n][e]);
        }
}

// ------------------------------------------------------------------------------------------------------------- host

std::string shape(const RelationLogits& a) {
    return "R, N, C, K = " + std::to_string(a.relations) + ", " + std::to_string(a.objects) + ", " +
           std::to_string(a.channels) + ", " + std::to_string(a.classes);
}

RelationCall relation_call(const RelationLogits& a, int element_bytes) {
    bool aligned = a.channels * element_bytes % 16 == 0;
    const auto check = [&](const void* data, int64_t row) {
        aligned = aligned && uintptr_t(data) % 16 == 0 && row * element_bytes % 16 == 0;
    };
    check(a.union_, a.union_row);
    for (int b = 0; b < a.count; ++b) {
        check(a.branches[b].subject, a.branches[b].subject_row), check(a.branches[b].object, a.branches[b].object_row);
        check(a.branches[b].weight, a.branches[b].weight_row);
    }
    return {a, nullptr, nullptr, 1, aligned};
}

}  // namespace

int relation_splits(const RelationLogits& a, int multiprocessors) {
    const int64_t blocks = divide_up(a.relations, kRelations) * divide_up(a.classes, kClasses);
    if (blocks == 0) return 1;
    // Each part has at least 256 channels.
    return int(std::clamp<int64_t>(std::min<int64_t>(2 * multiprocessors / blocks, a.channels / 256), 1, 64));
}

void relation_forward(const RelationLogits& a, int splits, float* workspace, const Queue& queue) {
    with_type(a.dtype, [&](auto zero) {
        using T = decltype(zero);
        RelationCall c = relation_call(a, sizeof(T));
        c.workspace = workspace, c.splits = splits;
        const auto kernel = a.count == 2 ? relation_forward_kernel<T, 2> : relation_forward_kernel<T, 1>;
        launch("sgalign's relation logits of " + shape(a), kernel,
               divide_up(a.relations, kRelations) * divide_up(a.classes, kClasses), splits, kThreads, kForwardBytes<T>,
               queue, c);
        launch("sgalign's relation logits (merge) of " + shape(a), relation_merge_kernel<T>,
               divide_up(a.count * a.relations * a.classes, kThreads), 1, kThreads, 0, queue, c);
    });
}

void relation_backward(const RelationLogits& a, const int64_t* orders, const Queue& queue) {
    with_type(a.dtype, [&](auto zero) {
        using T = decltype(zero);
        RelationCall c = relation_call(a, sizeof(T));
        c.orders = orders;
        const int64_t channel_tiles = divide_up(a.channels, kChannels<T>);
        if (a.grad_union)
            launch("sgalign's relation backward (union) of " + shape(a), relation_grad_union_kernel<T>,
                   divide_up(a.relations, kRelations) * channel_tiles, 1, kThreads, kGradTiles<T>, queue, c);
        launch("sgalign's relation backward (subject, object) of " + shape(a), relation_grad_ends_kernel<T>,
               channel_tiles, 2 * a.count, kThreads, kEndsBytes<T>, queue, c);
        launch("sgalign's relation backward (weight) of " + shape(a), relation_grad_weight_kernel<T>, channel_tiles,
               int(a.count * divide_up(a.classes, kClasses)), kThreads, kWeightBytes<T>, queue, c);
    });
}

}  // namespace sgalign::cuda
