// The Python module sgalign._C: addresses, sizes and strides, which the Python functions have checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#ifdef SGALIGN_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace sgalign;

namespace sgalign {
// setup.py says which are built
extern const AttentionKernels attention_baseline, attention_avx2, attention_avx512;
extern const RelationKernels relation_baseline, relation_avx2, relation_avx512;
extern const AlignmentKernels alignment_baseline, alignment_avx2, alignment_avx512;
}  // namespace sgalign

namespace {

struct Kernels {
    std::string instruction_set;
    AttentionKernels attention;
    RelationKernels relation;
    AlignmentKernels alignment;
};

// What this processor can run, the fastest first.
std::vector<Kernels> supported_kernels() {
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

Kernels kernels = supported_kernels().front();

using Address = std::uintptr_t;
using MatrixArgument = std::pair<Address, std::array<int64_t, 4>>;  // data, strides of [B, H, L, D] in elements

Matrix matrix(const MatrixArgument& argument) {
    const auto& [data, strides] = argument;
    return {reinterpret_cast<void*>(data), strides[0], strides[1], strides[2]};
}

// One branch: out, log_sum, random; and for the backward the gradient of out.
using BranchArgument = std::tuple<MatrixArgument, Address, bool, std::optional<MatrixArgument>>;
// One group: query, its branches; and for the backward the gradient of the query.
using GroupArgument = std::tuple<MatrixArgument, std::vector<BranchArgument>, std::optional<MatrixArgument>>;

Attention attention(int dtype, std::array<int64_t, 5> sizes, const std::vector<GroupArgument>& groups,
                    const MatrixArgument& key, const MatrixArgument& value, const std::optional<MatrixArgument>& mask,
                    const std::optional<std::pair<Address, std::array<int64_t, 2>>>& key_padding_mask, int64_t seed,
                    uint32_t stream, int mask_threshold, int dropout_threshold, double scale, int threads) {
    Attention a;
    a.dtype = DType(dtype);
    a.batch = sizes[0], a.heads = sizes[1], a.queries = sizes[2], a.keys = sizes[3], a.dim = sizes[4];
    if (groups.size() > 2) throw std::invalid_argument("at most two queries");
    for (const auto& [query, branches, grad_query] : groups) {
        if (groups.size() * branches.size() > 2) throw std::invalid_argument("at most two branches");
        QueryGroup& group = a.groups[a.group_count++];
        group.query = matrix(query);
        if (grad_query) group.grad_query = matrix(*grad_query);
        for (const auto& [out, log_sum, random, grad_out] : branches) {
            Branch& branch = group.branches[group.count++];
            branch.out = matrix(out);
            branch.log_sum = reinterpret_cast<void*>(log_sum);
            branch.random = random;
            if (grad_out) branch.grad_out = matrix(*grad_out);
        }
    }
    a.key = matrix(key), a.value = matrix(value);
    if (mask) {
        a.mask = reinterpret_cast<const uint8_t*>(mask->first);
        for (int i = 0; i < 4; ++i) a.mask_strides[i] = mask->second[i];
    }
    if (key_padding_mask) {
        a.key_padding = reinterpret_cast<const uint8_t*>(key_padding_mask->first);
        for (int i = 0; i < 2; ++i) a.key_padding_strides[i] = key_padding_mask->second[i];
    }
    a.seed = uint64_t(seed), a.stream = stream;
    a.mask_threshold = mask_threshold, a.dropout_threshold = dropout_threshold;
    a.scale = scale, a.threads = threads;
    return a;
}

using RowsArgument = std::pair<Address, int64_t>;  // data and the stride of rows, in elements
// One branch: subject, object, weight, bias (or 0), logits.
using RelationBranchArgument = std::tuple<RowsArgument, RowsArgument, RowsArgument, Address, Address>;
// Its gradients: of logits, subject, object and weight.
using RelationGradients = std::array<Address, 4>;

RelationLogits relation_logits(int dtype, std::array<int64_t, 4> sizes,
                               const std::vector<RelationBranchArgument>& branches, const RowsArgument& union_,
                               Address pairs, int threads) {
    RelationLogits a;
    a.dtype = DType(dtype);
    a.objects = sizes[0], a.relations = sizes[1], a.channels = sizes[2], a.classes = sizes[3];
    a.pairs = reinterpret_cast<const int64_t*>(pairs);
    if (branches.size() > 2) throw std::invalid_argument("at most two branches");
    const auto address = [](Address value) { return reinterpret_cast<void*>(value); };
    for (const auto& [subject, object, weight, bias, logits] : branches) {
        RelationBranch& branch = a.branches[a.count++];
        branch.subject = address(subject.first), branch.subject_row = subject.second;
        branch.object = address(object.first), branch.object_row = object.second;
        branch.weight = address(weight.first), branch.weight_row = weight.second;
        branch.bias = address(bias), branch.logits = address(logits);
    }
    a.union_ = address(union_.first), a.union_row = union_.second;
    a.threads = threads;
    return a;
}

void check_pairs(const RelationLogits& a) {
    for (int64_t i = 0; i < 2 * a.relations; ++i)
        if (a.pairs[i] < 0 || a.pairs[i] >= a.objects)
            throw std::out_of_range("pairs must be in 0 to " + std::to_string(a.objects - 1) +
                                    ", one less than the objects, got " + std::to_string(a.pairs[i]) + " in row " +
                                    std::to_string(i / 2));
}

void set_gradients(RelationLogits& a, const std::vector<RelationGradients>& gradients, Address grad_union) {
    for (int b = 0; b < a.count; ++b) {
        const auto& [logits, subject, object, weight] = gradients.at(b);
        RelationBranch& branch = a.branches[b];
        branch.grad_logits = reinterpret_cast<void*>(logits);
        branch.grad_subject = reinterpret_cast<void*>(subject);
        branch.grad_object = reinterpret_cast<void*>(object);
        branch.grad_weight = reinterpret_cast<void*>(weight);
    }
    a.grad_union = reinterpret_cast<void*>(grad_union);
}

AlignmentLoss alignment_loss(int dtype, std::array<int64_t, 2> sizes, const RowsArgument& logits,
                             const RowsArgument& mirrored, Address weight, double scale, bool sigmoid, bool symmetric,
                             Address losses, Address grad, int threads) {
    return {.dtype = DType(dtype),
            .relations = sizes[0],
            .classes = sizes[1],
            .logits = reinterpret_cast<void*>(logits.first),
            .mirrored = reinterpret_cast<void*>(mirrored.first),
            .logits_row = logits.second,
            .mirrored_row = mirrored.second,
            .weight = reinterpret_cast<void*>(weight),
            .scale = scale,
            .sigmoid = sigmoid,
            .symmetric = symmetric,
            .losses = reinterpret_cast<void*>(losses),
            .grad = reinterpret_cast<void*>(grad),
            .threads = threads};
}

#ifdef SGALIGN_CUDA
using QueueArgument = std::pair<int, Address>;  // device and stream

cuda::Queue queue(const QueueArgument& argument) { return {argument.first, reinterpret_cast<void*>(argument.second)}; }

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// As the functions for the CPU, with a queue to put the kernels into, a seed that lies in the device's memory, and the
// workspace that csrc/cuda/kernels.h asks for.
void define_cuda(py::module_& m) {
    m.def("cuda_attention_splits", &cuda::attention_splits);
    m.def("cuda_attention_forward",
          [](const Attention& a, Address seed, int splits, Address workspace, const QueueArgument& to) {
              py::gil_scoped_release unlocked;
              cuda::attention_forward(a, pointer<uint64_t>(seed), splits, pointer<float>(workspace), queue(to));
          });
    m.def("cuda_attention_backward", [](Attention a, const MatrixArgument& grad_key, const MatrixArgument& grad_value,
                                        Address seed, int splits, Address workspace, const QueueArgument& to) {
        a.grad_key = matrix(grad_key), a.grad_value = matrix(grad_value);
        py::gil_scoped_release unlocked;
        cuda::attention_backward(a, pointer<uint64_t>(seed), splits, pointer<float>(workspace), queue(to));
    });
    m.def("cuda_random_mask", [](Address out, int64_t batch_heads, int64_t queries, int64_t keys, Address seed,
                                 uint32_t stream, int threshold, const QueueArgument& to) {
        py::gil_scoped_release unlocked;
        cuda::random_mask({pointer<uint8_t>(out), batch_heads, queries, keys, 0, stream, threshold, 0},
                          pointer<uint64_t>(seed), queue(to));
    });
    m.def("cuda_relation_splits", &cuda::relation_splits);
    m.def("cuda_relation_forward", [](const RelationLogits& a, int splits, Address workspace, const QueueArgument& to) {
        py::gil_scoped_release unlocked;
        cuda::relation_forward(a, splits, pointer<float>(workspace), queue(to));
    });
    m.def("cuda_relation_backward", [](RelationLogits a, const std::vector<RelationGradients>& gradients,
                                       Address grad_union, Address orders, const QueueArgument& to) {
        set_gradients(a, gradients, grad_union);
        py::gil_scoped_release unlocked;
        cuda::relation_backward(a, pointer<int64_t>(orders), queue(to));
    });
    m.def("cuda_alignment_loss", [](const AlignmentLoss& a, const QueueArgument& to) {
        py::gil_scoped_release unlocked;
        cuda::alignment_loss(a, queue(to));
    });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("sources") = SGALIGN_SOURCES;
    m.attr("compiler") = SGALIGN_COMPILER;
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.def(
        "instruction_sets",
        [] {
            std::vector<std::string> names;
            for (const Kernels& supported : supported_kernels()) names.push_back(supported.instruction_set);
            return names;
        },
        "The instruction sets that this processor can run, the fastest first.");
    m.def("instruction_set", [] { return kernels.instruction_set; }, "The instruction set in use.");
    m.def(
        "use_instruction_set",
        [](const std::string& name) {
            for (const Kernels& supported : supported_kernels())
                if (name == supported.instruction_set) {
                    kernels = supported;
                    return;
                }
            throw std::invalid_argument("this processor cannot run '" + name + "'");
        },
        "Choose an instruction set, for tests.");

    py::class_<Attention>(m, "Attention", py::module_local()).def(py::init(&attention));
    m.def("attention_forward", [](const Attention& a) {
        py::gil_scoped_release unlocked;
        kernels.attention.forward(a);
    });
    m.def("attention_backward", [](Attention a, const MatrixArgument& grad_key, const MatrixArgument& grad_value) {
        a.grad_key = matrix(grad_key), a.grad_value = matrix(grad_value);
        py::gil_scoped_release unlocked;
        kernels.attention.backward(a);
    });
    m.def("random_mask", [](Address out, int64_t batch_heads, int64_t queries, int64_t keys, int64_t seed,
                            uint32_t stream, int threshold, int threads) {
        py::gil_scoped_release unlocked;
        kernels.attention.random_mask(
            {reinterpret_cast<uint8_t*>(out), batch_heads, queries, keys, uint64_t(seed), stream, threshold, threads});
    });

    py::class_<RelationLogits>(m, "RelationLogits", py::module_local()).def(py::init(&relation_logits));
    m.def("relation_forward", [](const RelationLogits& a) {
        check_pairs(a);
        py::gil_scoped_release unlocked;
        kernels.relation.forward(a);
    });
    m.def("relation_backward",
          [](RelationLogits a, const std::vector<RelationGradients>& gradients, Address grad_union) {
              check_pairs(a);
              set_gradients(a, gradients, grad_union);
              py::gil_scoped_release unlocked;
              kernels.relation.backward(a);
          });

    py::class_<AlignmentLoss>(m, "AlignmentLoss", py::module_local()).def(py::init(&alignment_loss));
    m.def("alignment_loss", [](const AlignmentLoss& a) {
        py::gil_scoped_release unlocked;
        kernels.alignment.loss(a);
    });

#ifdef SGALIGN_CUDA
    m.attr("cuda_archs") = SGALIGN_CUDA_ARCHS;
    define_cuda(m);
#endif
}
