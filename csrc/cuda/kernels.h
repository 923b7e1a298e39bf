// The CUDA backend's entry points. All of them only put kernels into a stream: nothing is allocated, nothing is waited
// for, so a CUDA graph can record them. Memory that they need beside operands and results is passed in.
#pragma once

#include "../kernels.h"

namespace sgalign::cuda {

// The device and the stream, a cudaStream_t.
struct Queue {
    int device = 0;
    void* stream = nullptr;
};

// `seed` lies in device memory and is read by the kernels; Attention::seed is not used.
// Workspace: with splits > 1 float32 [splits, branches, B, H, Lq, D + 1].
void attention_forward(const Attention&, const uint64_t* seed, int splits, float* workspace, const Queue&);
// Workspace: float32 [branches, B, H, Lq], and with splits > 1 [splits, queries, B, H, Lq, D] behind it.
void attention_backward(const Attention&, const uint64_t* seed, int splits, float* workspace, const Queue&);
void random_mask(const RandomMask&, const uint64_t* seed, const Queue&);

// Into how many parts the keys are best cut, to keep that many multiprocessors busy.
int attention_splits(const Attention&, int multiprocessors);

// Workspace: float32 [splits, branches, R, K].
void relation_forward(const RelationLogits&, int splits, float* workspace, const Queue&);
// `orders` [2, R] lists the pairs by subject, and by object, those of the same object in their own order.
void relation_backward(const RelationLogits&, const int64_t* orders, const Queue&);
int relation_splits(const RelationLogits&, int multiprocessors);

void alignment_loss(const AlignmentLoss&, const Queue&);

}  // namespace sgalign::cuda
