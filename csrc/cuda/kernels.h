// The entry points of the CUDA backend. They only launch kernels on a stream. They do not allocate memory and do not
// wait, so a CUDA graph can capture them. The caller passes in all memory, including workspaces.
#pragma once

#include "../kernels.h"

namespace sgalign::cuda {

// A device and one of its streams, a cudaStream_t.
struct Queue {
    int device = 0;
    void* stream = nullptr;
};

// `seed` is in device memory, and the kernels read it there. They do not use Attention::seed.
// Workspace: float32 [splits, branches, B, H, Lq, D + 1] if splits > 1, otherwise none.
void attention_forward(const Attention&, const uint64_t* seed, int splits, float* workspace, const Queue&);
// Workspace: float32 [branches, B, H, Lq], followed by [splits, groups, B, H, Lq, D] if splits > 1. There is one group
// if both branches have the same query, otherwise one per branch.
void attention_backward(const Attention&, const uint64_t* seed, int splits, float* workspace, const Queue&);
void random_mask(const RandomMask&, const uint64_t* seed, const Queue&);

// Return the number of parts into which the keys are split to keep a GPU with this many multiprocessors busy. Python
// and the Triton kernels call these parts splits.
int attention_splits(const Attention&, int multiprocessors);

// Workspace: float32 [splits, branches, R, K].
void relation_forward(const RelationLogits&, int splits, float* workspace, const Queue&);
// `orders` [2, R] lists the pairs sorted by subject, then the pairs sorted by object. Both sorts are stable.
void relation_backward(const RelationLogits&, const int64_t* orders, const Queue&);
int relation_splits(const RelationLogits&, int multiprocessors);

void alignment_loss(const AlignmentLoss&, const Queue&);

}  // namespace sgalign::cuda
