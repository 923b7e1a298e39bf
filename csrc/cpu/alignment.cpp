// The alignment loss on the CPU. One pass computes the divergence of each relation and its gradient with respect to the
// mirrored logits.
#include "product.h"

namespace {

using namespace sgalign;

template <class R>
constexpr R kInfinity = __builtin_inf();

// log(1 + u) for u in [0, 1], as the series of 2 atanh(u / (2 + u)). Its terms are not negative, and each is at most
// 1/9 of the previous one.
template <class R>
inline Vector<R> log1p(Vector<R> u) {
    constexpr int terms = sizeof(R) == 4 ? 8 : 17;
    const Vector<R> f = u / (u + R(2)), square = f * f;
    Vector<R> sum = broadcast<R>(R(1) / (2 * terms - 1));
    for (int i = terms - 1; i >= 1; --i) sum = sum * square + R(1) / (2 * i - 1);
    return R(2) * f * sum;
}

template <class R>
inline Vector<R> exp(Vector<R> x) {
    return exp2<R>(x * R(kLog2e));
}

// Replace x by its log-softmax, x - log(sum of e^x), and write the softmax to p. Entries of -inf, such as the padding,
// stay -inf and get p = 0.
template <class R>
void log_softmax(R* x, R* p, int64_t padded) {
    Vector<R> top = broadcast(-kInfinity<R>);
    for (int64_t k = 0; k < padded; k += Real<R>::lanes) top = load(x + k) > top ? load(x + k) : top;
    const R largest = largest_lane<R>(top);
    Vector<R> sum{};
    for (int64_t k = 0; k < padded; k += Real<R>::lanes) sum += exp<R>(load(x + k) - largest);
    const R log_sum = log2_scalar(sum_lanes<R>(sum)) / R(kLog2e);
    for (int64_t k = 0; k < padded; k += Real<R>::lanes) {
        // The maximum is subtracted first. This removes the common part of large logits without a rounding error.
        store<R>(x + k, load(x + k) - largest - log_sum);
        store<R>(p + k, exp<R>(load(x + k)));
    }
}

// The term of one class in KL(p || q). It is 0 if p is 0, and infinite if only q is 0, even if p was rounded to 0.
template <class R>
inline Vector<R> divergence(Vector<R> p, Vector<R> log_p, Vector<R> log_q) {
    const Vector<R> ratio = log_p - log_q;
    const Vector<R> term = p == R(0) ? Vector<R>{} : p * ratio;
    return ratio == kInfinity<R> ? ratio : term;
}

// Return the loss of a row with one categorical distribution, for teacher logits x and student logits y. Write the
// softmax of x to t, the softmax of y to s, and the gradient with respect to y, times `factor`, to `grad`.
template <class R>
R softmax_row(R* x, R* y, R* t, R* s, int64_t padded, bool symmetric, R factor, R* grad) {
    log_softmax(x, t, padded);
    log_softmax(y, s, padded);
    Vector<R> ahead{}, back{};
    for (int64_t k = 0; k < padded; k += Real<R>::lanes) {
        ahead += divergence<R>(load(t + k), load(x + k), load(y + k));
        if (symmetric) back += divergence<R>(load(s + k), load(y + k), load(x + k));
    }
    const R forward = sum_lanes<R>(ahead), backward = sum_lanes<R>(back);
    const R half = symmetric ? R(0.5) : R(1);
    for (int64_t k = 0; k < padded; k += Real<R>::lanes) {
        Vector<R> g = load(s + k) - load(t + k);
        if (symmetric) g += divergence<R>(load(s + k), load(y + k), load(x + k)) - load(s + k) * backward;
        store<R>(grad + k, g * (half * factor));
    }
    return half * (forward + backward);
}

template <class R>
struct Bernoulli {
    Vector<R> p, q, log_p, log_q;
    explicit Bernoulli(Vector<R> x) {
        const Vector<R> below = x < R(0) ? x : Vector<R>{}, above = x > R(0) ? x : Vector<R>{};
        const Vector<R> u = exp<R>(below - above), tail = log1p<R>(u);
        const Vector<R> likely = R(1) / (u + R(1)), unlikely = u / (u + R(1));
        const Vector<R> nan = x != x ? x : Vector<R>{};  // restores a NaN of x, which the comparisons lose
        p = (x < R(0) ? unlikely : likely) + nan;
        q = (x < R(0) ? likely : unlikely) + nan;
        log_p = below - tail + nan;
        log_q = nan - above - tail;
    }
};

// Return the loss of a row with one Bernoulli distribution per class. Padding adds nothing, because it is equal in the
// teacher and the student.
template <class R>
R sigmoid_row(const R* x, const R* y, int64_t padded, bool symmetric, R factor, R* grad) {
    const R half = symmetric ? R(0.5) : R(1);
    Vector<R> sum{};
    for (int64_t k = 0; k < padded; k += Real<R>::lanes) {
        const Bernoulli<R> t(load(x + k)), s(load(y + k));
        sum += divergence<R>(t.p, t.log_p, s.log_p) + divergence<R>(t.q, t.log_q, s.log_q);
        Vector<R> g = s.p - t.p;
        if (symmetric) {
            sum += divergence<R>(s.p, s.log_p, t.log_p) + divergence<R>(s.q, s.log_q, t.log_q);
            const Vector<R> spread = s.p * s.q;
            g += spread == R(0) ? Vector<R>{} : spread * (load(y + k) - load(x + k));
        }
        store<R>(grad + k, g * (half * factor));
    }
    return half * sum_lanes<R>(sum);
}

template <class T>
void align(const AlignmentLoss& a) {
    using R = typename Storage<T>::R;
    const int64_t padded = round_to_panel<R>(a.classes);
    const Scratch scratch(a.threads, 5 * padded * int64_t(sizeof(R)) + 64 * 5);
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t row = 0; row < a.relations; ++row) {
        char* cursor = scratch.of_thread(thread_index());
        R* const x = take<R>(cursor, padded);
        R* const y = take<R>(cursor, padded);
        R* const t = take<R>(cursor, padded);
        R* const s = take<R>(cursor, padded);
        R* const grad = take<R>(cursor, padded);
        const R fill = a.sigmoid ? R(0) : -kInfinity<R>;
        read_row((const T*)a.logits + row * a.logits_row, a.classes, padded, fill, x);
        read_row((const T*)a.mirrored + row * a.mirrored_row, a.classes, padded, fill, y);
        const R factor = R(a.scale) * (a.weight ? ((const R*)a.weight)[row] : R(1));
        const R loss = a.sigmoid ? sigmoid_row<R>(x, y, padded, a.symmetric, factor, grad)
                                 : softmax_row<R>(x, y, t, s, padded, a.symmetric, factor, grad);
        ((R*)a.losses)[row] = factor == R(0) ? R(0) : factor * loss;
        R* const out = (R*)a.grad + row * a.classes;
        for (int64_t k = 0; k < a.classes; ++k) out[k] = factor == R(0) ? R(0) : grad[k];
    }
}

void alignment_loss(const AlignmentLoss& a) {
    with_type(a.dtype, [&](auto zero) { align<decltype(zero)>(a); });
}

}  // namespace

namespace sgalign {
extern const AlignmentKernels SGALIGN_KERNELS;  // for example alignment_avx2
const AlignmentKernels SGALIGN_KERNELS = {alignment_loss};
}  // namespace sgalign
