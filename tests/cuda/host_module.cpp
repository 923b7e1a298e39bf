// What csrc/bindings.cpp wants of the CPU's kernels, which the module of the tests does without.
#include "../../csrc/kernels.h"

namespace sgalign {
extern const AttentionKernels attention_baseline;
extern const RelationKernels relation_baseline;
extern const AlignmentKernels alignment_baseline;
const AttentionKernels attention_baseline{};
const RelationKernels relation_baseline{};
const AlignmentKernels alignment_baseline{};
}  // namespace sgalign
