// The relation head on the CPU: logits of R pairs of N objects, forward and backward, for one or both branches.
//
// The matrix (subject + object) * union, which is multiplied by the weights, has size R x C. Both passes compute one
// tile of it at a time, just before they use the tile. A tile of `union` is read once for both branches.
//
// A forward task computes some of the pairs. A backward task computes some of the channels. The backward pass sums the
// gradients of subject, object and weight over pairs. Each of these sums belongs to one task, which adds in the order
// of the pairs. This needs no merging, sorting or atomics, and results do not depend on the number of threads.
#include "product.h"

namespace {

using namespace sgalign;

constexpr int kRows = 4 * kTileRows;
// Channels of a forward tile and of a backward task. The tiles of both branches and their operands fit in the L2 cache.
constexpr int64_t kForwardChannels = 256, kBackwardChannels = 128;

template <class T, class R = typename Storage<T>::R>
inline void write_row(const R* source, int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = Storage<T>::write(source[i]);
}

// out = (subject + object) * union for `count` channels, then zeros up to `padded`
template <class T, class R = typename Storage<T>::R>
inline void product_row(const T* subject, const T* object, const T* union_, int64_t count, int64_t padded, R* out) {
    for (int64_t i = 0; i < count; ++i)
        out[i] = (Storage<T>::read(subject[i]) + Storage<T>::read(object[i])) * Storage<T>::read(union_[i]);
    for (int64_t i = count; i < padded; ++i) out[i] = 0;
}

template <class T>
void forward(const RelationLogits& a) {
    using R = typename Storage<T>::R;
    const int64_t columns = round_to_panel<R>(a.classes), channels = a.channels;
    // The weights are transposed to [branch][panel][C][kPanel].
    const int64_t panel = channels * kPanel<R>;
    const Scratch packed(1, a.count * columns * channels * int64_t(sizeof(R)) + 64);
    char* cursor = packed.of_thread(0);
    R* const weights = take<R>(cursor, a.count * columns * channels);
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t task = 0; task < a.count * (columns / kPanel<R>); ++task) {
        const RelationBranch& branch = a.branches[task / (columns / kPanel<R>)];
        const int64_t first = task % (columns / kPanel<R>)*kPanel<R>;
        R* out = weights + task * panel;
        for (int64_t k = 0; k < kPanel<R>; ++k) {
            const T* row = (const T*)branch.weight + (first + k) * branch.weight_row;
            for (int64_t c = 0; c < channels; ++c)
                out[c * kPanel<R> + k] = first + k < a.classes ? Storage<T>::read(row[c]) : R(0);
        }
    }
    const Scratch scratch(a.threads, (kRows * (kForwardChannels + 2 * columns)) * int64_t(sizeof(R)) + 64 * 2);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t first = 0; first < a.relations; first += kRows) {
        const int64_t rows = smaller(kRows, a.relations - first);
        char* mine = scratch.of_thread(thread_index());
        R* const tile = take<R>(mine, kRows * kForwardChannels);
        R* const logits = take<R>(mine, 2 * kRows * columns);
        memset(logits, 0, sizeof(R) * 2 * kRows * columns);
        for (int64_t c = 0; c < channels; c += kForwardChannels) {
            const int64_t depth = smaller(kForwardChannels, channels - c);
            for (int b = 0; b < a.count; ++b) {
                const RelationBranch& branch = a.branches[b];
                for (int64_t i = 0; i < rows; ++i) {
                    const int64_t* pair = a.pairs + 2 * (first + i);
                    product_row((const T*)branch.subject + pair[0] * branch.subject_row + c,
                                (const T*)branch.object + pair[1] * branch.object_row + c,
                                (const T*)a.union_ + (first + i) * a.union_row + c, depth, depth,
                                tile + i * kForwardChannels);
                }
                multiply<R, true>(rows, columns, depth, {tile, kForwardChannels, 1},
                                  {weights + b * columns * channels + c * kPanel<R>, kPanel<R>, panel},
                                  logits + b * kRows * columns, columns);
            }
        }
        for (int b = 0; b < a.count; ++b)
            for (int64_t i = 0; i < rows; ++i) {
                R* row = logits + (b * kRows + i) * columns;
                if (const T* bias = (const T*)a.branches[b].bias)
                    for (int64_t k = 0; k < a.classes; ++k) row[k] += Storage<T>::read(bias[k]);
                write_row(row, a.classes, (T*)a.branches[b].logits + (first + i) * a.classes);
            }
    }
}

template <class T>
void backward(const RelationLogits& a) {
    using R = typename Storage<T>::R;
    const int64_t gradients = a.relations * a.classes;
    const Scratch converted(1, a.count * gradients * int64_t(sizeof(R)) + 64);
    char* cursor = converted.of_thread(0);
    R* const grad_logits = take<R>(cursor, a.count * gradients);
    for (int b = 0; b < a.count; ++b)
        read_row((const T*)a.branches[b].grad_logits, gradients, gradients, R(0), grad_logits + b * gradients);

    constexpr int64_t width = kBackwardChannels;
    const int64_t sums = 2 * a.objects + 2 * a.classes;  // rows of grad_subject, grad_object, weight and grad_weight
    const Scratch scratch(a.threads, (a.count * sums + 4 * kRows) * width * int64_t(sizeof(R)) + 64 * 8);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t c = 0; c < a.channels; c += width) {
        const int64_t count = smaller(width, a.channels - c), padded = round_to_panel<R>(count);
        char* mine = scratch.of_thread(thread_index());
        R *weight[2], *grad_weight[2], *grad_subject[2], *grad_object[2];
        for (int b = 0; b < a.count; ++b) {
            weight[b] = take<R>(mine, a.classes * width);
            for (int64_t k = 0; k < a.classes; ++k)
                read_row((const T*)a.branches[b].weight + k * a.branches[b].weight_row + c, count, padded, R(0),
                         weight[b] + k * width);
            grad_weight[b] = take<R>(mine, a.classes * width);
            grad_subject[b] = take<R>(mine, a.objects * width);
            grad_object[b] = take<R>(mine, a.objects * width);
            memset(grad_weight[b], 0, sizeof(R) * a.classes * width);
            memset(grad_subject[b], 0, sizeof(R) * a.objects * width);
            memset(grad_object[b], 0, sizeof(R) * a.objects * width);
        }
        R* const product = take<R>(mine, kRows * width);  // (subject + object) * union
        R* const grad_product = take<R>(mine, kRows * width);
        R* const union_ = take<R>(mine, kRows * width);
        R* const grad_union = take<R>(mine, kRows * width);
        for (int64_t first = 0; first < a.relations; first += kRows) {
            const int64_t rows = smaller(kRows, a.relations - first);
            for (int64_t i = 0; i < rows; ++i)
                read_row((const T*)a.union_ + (first + i) * a.union_row + c, count, padded, R(0), union_ + i * width);
            for (int b = 0; b < a.count; ++b) {
                const RelationBranch& branch = a.branches[b];
                const R* grad = grad_logits + b * gradients + first * a.classes;
                multiply<R, false>(rows, padded, a.classes, {grad, a.classes, 1}, {weight[b], width, kPanel<R>},
                                   grad_product, width);
                for (int64_t i = 0; i < rows; ++i) {
                    const int64_t* pair = a.pairs + 2 * (first + i);
                    const T* subject = (const T*)branch.subject + pair[0] * branch.subject_row + c;
                    const T* object = (const T*)branch.object + pair[1] * branch.object_row + c;
                    R* const to_subject = grad_subject[b] + pair[0] * width;
                    R* const to_object = grad_object[b] + pair[1] * width;
                    const R *dp = grad_product + i * width, *u = union_ + i * width;
                    R *p = product + i * width, *du = grad_union + i * width;
                    for (int64_t d = 0; d < count; ++d) {
                        const R sum = Storage<T>::read(subject[d]) + Storage<T>::read(object[d]);
                        p[d] = sum * u[d];
                        du[d] = dp[d] * sum + (b ? du[d] : R(0));
                    }
                    for (int64_t d = count; d < padded; ++d) p[d] = 0;
                    for (int64_t d = 0; d < count; ++d) to_subject[d] += dp[d] * u[d];
                    for (int64_t d = 0; d < count; ++d) to_object[d] += dp[d] * u[d];
                }
                multiply<R, true>(a.classes, padded, rows, {grad, 1, a.classes}, {product, width, kPanel<R>},
                                  grad_weight[b], width);
            }
            if (a.grad_union)
                for (int64_t i = 0; i < rows; ++i)
                    write_row(grad_union + i * width, count, (T*)a.grad_union + (first + i) * a.channels + c);
        }
        for (int b = 0; b < a.count; ++b) {
            const RelationBranch& branch = a.branches[b];
            for (int64_t k = 0; k < a.classes; ++k)
                write_row(grad_weight[b] + k * width, count, (T*)branch.grad_weight + k * a.channels + c);
            for (int64_t n = 0; n < a.objects; ++n) {
                write_row(grad_subject[b] + n * width, count, (T*)branch.grad_subject + n * a.channels + c);
                write_row(grad_object[b] + n * width, count, (T*)branch.grad_object + n * a.channels + c);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ entry points

void relation_forward(const RelationLogits& a) {
    with_type(a.dtype, [&](auto zero) { forward<decltype(zero)>(a); });
}

void relation_backward(const RelationLogits& a) {
    with_type(a.dtype, [&](auto zero) { backward<decltype(zero)>(a); });
}

}  // namespace

namespace sgalign {
extern const RelationKernels SGALIGN_KERNELS;  // for example relation_avx2
const RelationKernels SGALIGN_KERNELS = {relation_forward, relation_backward};
}  // namespace sgalign
