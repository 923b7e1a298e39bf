// The alignment loss on a GPU. Each warp computes the divergence of one relation and its gradient with respect to the
// mirrored logits.
#include <cmath>

#include "launch.cuh"

namespace sgalign::cuda {

namespace {

constexpr int kWarps = 4;

__device__ __forceinline__ float sum_of_warp(float value) {
    for (int mask = kWarp / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}
__device__ __forceinline__ float largest_of_warp(float value) {
    for (int mask = kWarp / 2; mask; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

// The term of one class in KL(p || q). It is 0 if p is 0, and infinite if only q is 0, even if p was rounded to 0.
__device__ __forceinline__ float divergence(float p, float log_p, float log_q) {
    const float ratio = log_p - log_q, term = p == 0 ? 0 : p * ratio;
    return ratio == INFINITY ? ratio : term;
}

template <class T>
struct LogSoftmax {
    const T* row;
    float largest, log_sum;

    __device__ LogSoftmax(const T* row, int64_t classes) : row(row), largest(-INFINITY) {
        for (int64_t k = lane_index(); k < classes; k += kWarp) largest = fmaxf(largest, to_float(row[k]));
        largest = largest_of_warp(largest);
        float sum = 0;
        for (int64_t k = lane_index(); k < classes; k += kWarp) sum += expf(to_float(row[k]) - largest);
        log_sum = logf(sum_of_warp(sum));
    }
    // The maximum is subtracted first. This removes the common part of large logits without a rounding error.
    __device__ float operator[](int64_t k) const { return to_float(row[k]) - largest - log_sum; }
};

struct Bernoulli {
    float p, q, log_p, log_q;
    __device__ explicit Bernoulli(float x) {
        const float u = expf(-fabsf(x)), tail = log1pf(u), likely = 1 / (u + 1), unlikely = u / (u + 1);
        p = x < 0 ? unlikely : likely;
        q = x < 0 ? likely : unlikely;
        log_p = (x < 0 ? x : 0) - tail;
        log_q = (x > 0 ? -x : 0) - tail;
        if (x != x) p = q = log_p = log_q = x;
    }
};

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) alignment_loss_kernel(const __grid_constant__ AlignmentLoss a) {
    const int64_t row = int64_t(block_index()) * kWarps + warp_index();
    if (row >= a.relations) return;
    const T* const x = (const T*)a.logits + row * a.logits_row;
    const T* const y = (const T*)a.mirrored + row * a.mirrored_row;
    float* const grad = (float*)a.grad + row * a.classes;
    const float factor = float(a.scale) * (a.weight ? ((const float*)a.weight)[row] : 1.0f);
    const float slope = a.symmetric ? 0.5f * factor : factor;
    float loss = 0;
    if (a.sigmoid) {
        for (int64_t k = lane_index(); k < a.classes; k += kWarp) {
            const Bernoulli t(to_float(x[k])), s(to_float(y[k]));
            loss += divergence(t.p, t.log_p, s.log_p) + divergence(t.q, t.log_q, s.log_q);
            float g = s.p - t.p;
            if (a.symmetric) {
                loss += divergence(s.p, s.log_p, t.log_p) + divergence(s.q, s.log_q, t.log_q);
                const float spread = s.p * s.q;
                g += spread == 0 ? 0 : spread * (to_float(y[k]) - to_float(x[k]));
            }
            grad[k] = factor == 0 ? 0 : g * slope;
        }
        loss = sum_of_warp(loss);
    } else {
        const LogSoftmax<T> log_t(x, a.classes), log_s(y, a.classes);
        float ahead = 0, back = 0;
        for (int64_t k = lane_index(); k < a.classes; k += kWarp) {
            ahead += divergence(expf(log_t[k]), log_t[k], log_s[k]);
            // This is computed even if it is not needed, because an `if` here costs 8 registers.
            back += divergence(expf(log_s[k]), log_s[k], log_t[k]);
        }
        ahead = sum_of_warp(ahead), back = sum_of_warp(back);
        loss = ahead + (a.symmetric ? back : 0);
        for (int64_t k = lane_index(); k < a.classes; k += kWarp) {
            const float t = expf(log_t[k]), s = expf(log_s[k]);
            float g = s - t;
            if (a.symmetric) g += divergence(s, log_s[k], log_t[k]) - s * back;
            grad[k] = factor == 0 ? 0 : g * slope;
        }
    }
    if (lane_index() == 0) ((float*)a.losses)[row] = factor == 0 ? 0 : slope * loss;
}

}  // namespace

void alignment_loss(const AlignmentLoss& a, const Queue& queue) {
    with_type(a.dtype, [&](auto zero) {
        launch("sgalign's alignment loss of " + std::to_string(a.relations) + " x " + std::to_string(a.classes),
               alignment_loss_kernel<decltype(zero)>, divide_up(a.relations, kWarps), 1, kWarps * kWarp, 0, queue, a);
    });
}

}  // namespace sgalign::cuda
