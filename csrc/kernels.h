// The parameters of the kernels: addresses, sizes and strides. Nothing here depends on torch.
#pragma once

#include <cstdint>

namespace sgalign {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// A [B, H, L, D] tensor with unit stride along D. Strides are in elements.
struct Matrix {
    void* data = nullptr;
    int64_t batch = 0, head = 0, row = 0;
};

// One softmax over the keys. A query may have two branches: a supervised one, and a mirrored one with the random mask.
struct Branch {
    Matrix out;
    // [B, H, Lq], float32, or float64 for float64 inputs: log2 of the sum of 2^score, +inf if all keys are dropped
    void* log_sum = nullptr;
    Matrix grad_out;
    bool random = false;  // true if the random mask drops entries of this branch
};

// A query with one or two branches. Its rows are multiplied by the keys once, and all its branches use the resulting
// scores.
struct QueryGroup {
    Matrix query, grad_query;
    Branch branches[2];
    int count = 0;
};

struct Attention {
    DType dtype = DType::float32;
    int64_t batch = 0, heads = 0, queries = 0, keys = 0, dim = 0;
    QueryGroup groups[2];
    int group_count = 0;
    Matrix key, value, grad_key, grad_value;

    const uint8_t* mask = nullptr;  // explicit mask, non-zero = dropped, any strides (0 along broadcast dimensions)
    int64_t mask_strides[4] = {0, 0, 0, 0};
    const uint8_t* key_padding = nullptr;  // [B, Lk], non-zero = ignored
    int64_t key_padding_strides[2] = {0, 0};

    uint64_t seed = 0;
    uint32_t stream = 0;
    int mask_threshold = 0, dropout_threshold = 0;  // probabilities times 65536
    double scale = 1;
    int threads = 1;
};

// A random mask without attention: uint8 [batch_heads, queries, keys].
struct RandomMask {
    uint8_t* out = nullptr;
    int64_t batch_heads = 0, queries = 0, keys = 0;
    uint64_t seed = 0;
    uint32_t stream = 0;
    int threshold = 0, threads = 1;
};

// One branch of the relation head. Matrices have unit stride along their last dimension. Row strides are in elements.
struct RelationBranch {
    const void *subject = nullptr, *object = nullptr, *weight = nullptr,
               *bias = nullptr;  // [N, C], [N, C], [K, C], [K]
    int64_t subject_row = 0, object_row = 0, weight_row = 0;
    void* logits = nullptr;                                                        // [R, K], contiguous
    const void* grad_logits = nullptr;                                             // [R, K], contiguous
    void *grad_subject = nullptr, *grad_object = nullptr, *grad_weight = nullptr;  // contiguous
};

// logits[r] = weight ((subject[pairs[r, 0]] + object[pairs[r, 1]]) * union[r]) + bias, for branches that share `union`.
// A relation is a pair of objects.
struct RelationLogits {
    DType dtype = DType::float32;
    int64_t objects = 0, relations = 0, channels = 0, classes = 0;  // N, R, C, K
    RelationBranch branches[2];
    int count = 0;
    const int64_t* pairs = nullptr;  // [R, 2], contiguous, numbers from 0 to N - 1
    const void* union_ = nullptr;    // [R, C]
    int64_t union_row = 0;
    void* grad_union = nullptr;  // [R, C], contiguous; null if not wanted
    int threads = 1;
};

// The alignment loss. `losses` receives the divergence between the two predictions of each relation, times `scale` and
// the relation's weight. `grad` receives the gradient of `losses` with respect to the mirrored logits.
struct AlignmentLoss {
    DType dtype = DType::float32;
    int64_t relations = 0, classes = 0;
    const void *logits = nullptr, *mirrored = nullptr;  // [R, K], unit stride along K
    int64_t logits_row = 0, mirrored_row = 0;
    const void* weight = nullptr;  // [R], float32, or float64 for float64 inputs; null if all weights are 1
    double scale = 1;
    bool sigmoid = false;
    bool symmetric = false;  // the mean of KL(supervised || mirrored) and KL(mirrored || supervised), else the first
    void* losses = nullptr;  // [R], float32, or float64 for float64 inputs
    // [R, K], contiguous, float32, or float64 for float64 inputs, because its factor 1 / (R K) can be too small for
    // float16
    void* grad = nullptr;
    int threads = 1;
};

// The entry points for one instruction set. Each file cpu/*.cpp is compiled once per instruction set.
struct AttentionKernels {
    void (*forward)(const Attention&);
    void (*backward)(const Attention&);
    void (*random_mask)(const RandomMask&);
};
struct RelationKernels {
    void (*forward)(const RelationLogits&);
    void (*backward)(const RelationLogits&);
};
struct AlignmentKernels {
    void (*loss)(const AlignmentLoss&);
};

}  // namespace sgalign
