// The descriptions of calls, which are read from flat lists of numbers. sgalign/ops writes these lists. An `Arguments`
// returns the numbers one after the other: integer(), number() and address(), and done() at the end.
#pragma once

#include <stdexcept>

#include "kernels.h"

namespace sgalign {

// Read the address of a matrix and its strides in elements.
template <class Arguments>
Matrix matrix(Arguments& next) {
    Matrix result{next.address(), next.integer(), next.integer(), next.integer()};
    next.integer();  // skip the last stride, which is 1
    return result;
}

// Read the numbers in the order of `_description` in sgalign/ops/_attention_backends.py. A forward call has no
// gradients.
template <class Arguments>
Attention attention(Arguments& next) {
    Attention a;
    a.dtype = DType(next.integer());
    a.batch = next.integer(), a.heads = next.integer(), a.queries = next.integer(), a.dim = next.integer();
    a.keys = next.integer();
    a.key = matrix(next), a.value = matrix(next);
    a.mask = static_cast<const uint8_t*>(next.address());
    for (int64_t& stride : a.mask_strides) stride = next.integer();
    a.key_padding = static_cast<const uint8_t*>(next.address());
    for (int64_t& stride : a.key_padding_strides) stride = next.integer();
    a.seed = uint64_t(next.integer());
    a.mask_threshold = int(next.integer()), a.dropout_threshold = int(next.integer());
    a.stream = uint32_t(next.integer());
    a.scale = next.number(), a.threads = int(next.integer());

    const int64_t branches = next.integer();
    a.group_count = int(next.integer());
    if (branches < 1 || branches > 2 || a.group_count < 1 || a.group_count > branches)
        throw std::invalid_argument("attention takes one or two branches, with one query for each or one for both");
    for (int i = 0; i < a.group_count; ++i) a.groups[i].query = matrix(next);
    Branch* each[2];
    for (int i = 0; i < branches; ++i) {
        QueryGroup& group = a.groups[a.group_count == 1 ? 0 : i];
        each[i] = &group.branches[group.count++];
        each[i]->out = matrix(next);
        each[i]->log_sum = next.address();
        each[i]->random = i == branches - 1;
    }
    if (!next.done()) {
        for (int i = 0; i < branches; ++i) each[i]->grad_out = matrix(next);
        for (int i = 0; i < a.group_count; ++i) a.groups[i].grad_query = matrix(next);
        a.grad_key = matrix(next), a.grad_value = matrix(next);
    }
    return a;
}

// Read the numbers in the order of `_description` in sgalign/ops/relation.py. A forward call has no gradients.
template <class Arguments>
RelationLogits relation_logits(Arguments& next) {
    RelationLogits a;
    a.dtype = DType(next.integer());
    a.objects = next.integer(), a.classes = next.integer(), a.relations = next.integer(), a.channels = next.integer();
    a.union_ = next.address(), a.union_row = next.integer();
    a.pairs = static_cast<const int64_t*>(next.address());
    a.threads = int(next.integer());
    const int64_t branches = next.integer();
    if (branches < 1 || branches > 2) throw std::invalid_argument("relation logits take one or two branches");
    for (a.count = 0; a.count < branches; ++a.count) {
        RelationBranch& branch = a.branches[a.count];
        branch.subject = next.address(), branch.subject_row = next.integer();
        branch.object = next.address(), branch.object_row = next.integer();
        branch.weight = next.address(), branch.weight_row = next.integer();
        branch.bias = next.address(), branch.logits = next.address();
    }
    if (!next.done()) {
        for (int i = 0; i < a.count; ++i) {
            RelationBranch& branch = a.branches[i];
            branch.grad_logits = next.address(), branch.grad_subject = next.address();
            branch.grad_object = next.address(), branch.grad_weight = next.address();
        }
        a.grad_union = next.address();
    }
    return a;
}

// Read the numbers in the order of `_description` in sgalign/ops/alignment.py.
template <class Arguments>
AlignmentLoss alignment_loss(Arguments& next) {
    AlignmentLoss a;
    a.dtype = DType(next.integer());
    a.relations = next.integer(), a.classes = next.integer();
    a.logits = next.address(), a.logits_row = next.integer();
    a.mirrored = next.address(), a.mirrored_row = next.integer();
    a.weight = next.address(), a.scale = next.number();
    a.sigmoid = next.integer(), a.symmetric = next.integer();
    a.losses = next.address(), a.grad = next.address();
    a.threads = int(next.integer());
    return a;
}

}  // namespace sgalign
