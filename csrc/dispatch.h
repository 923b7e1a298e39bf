// The kernels for each instruction set, and the choice among them when the program runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace sgalign {

// setup.py decides which of these are built.
extern const AttentionKernels attention_baseline, attention_avx2, attention_avx512;
extern const RelationKernels relation_baseline, relation_avx2, relation_avx512;
extern const AlignmentKernels alignment_baseline, alignment_avx2, alignment_avx512;

struct Kernels {
    std::string instruction_set;
    AttentionKernels attention;
    RelationKernels relation;
    AlignmentKernels alignment;
};

// Return the kernels that this processor can run, fastest first.
inline std::vector<Kernels> supported_kernels() {
    std::vector<Kernels> result;
#ifdef SGALIGN_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        result.push_back({"avx512", attention_avx512, relation_avx512, alignment_avx512});
#endif
#ifdef SGALIGN_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        result.push_back({"avx2", attention_avx2, relation_avx2, alignment_avx2});
#endif
    result.push_back({"baseline", attention_baseline, relation_baseline, alignment_baseline});
    return result;
}

}  // namespace sgalign
