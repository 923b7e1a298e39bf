// The Python module sgalign._C: addresses, sizes and strides in, nothing out. sgalign/attention.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"

namespace py = pybind11;
using namespace sgalign;

namespace sgalign {
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;  // setup.py says which are built
}  // namespace sgalign

namespace {

using NamedKernels = std::pair<std::string, const Kernels*>;

// What this processor can run, the fastest first.
std::vector<NamedKernels> supported_kernels() {
    std::vector<NamedKernels> result;
#ifdef SGALIGN_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        result.emplace_back("avx512", &kernels_avx512);
#endif
#ifdef SGALIGN_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) result.emplace_back("avx2", &kernels_avx2);
#endif
    result.emplace_back("baseline", &kernels_baseline);
    return result;
}

NamedKernels kernels = supported_kernels().front();

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
            for (const auto& [name, _] : supported_kernels()) names.push_back(name);
            return names;
        },
        "The instruction sets that this processor can run, the fastest first.");
    m.def("instruction_set", [] { return kernels.first; }, "The instruction set in use.");
    m.def(
        "use_instruction_set",
        [](const std::string& name) {
            for (const NamedKernels& supported : supported_kernels())
                if (name == supported.first) {
                    kernels = supported;
                    return;
                }
            throw std::invalid_argument("this processor cannot run '" + name + "'");
        },
        "Choose an instruction set, for tests.");

    py::class_<Attention>(m, "Attention").def(py::init(&attention));
    m.def("attention_forward", [](const Attention& a) {
        py::gil_scoped_release unlocked;
        kernels.second->attention_forward(a);
    });
    m.def("attention_backward", [](Attention a, const MatrixArgument& grad_key, const MatrixArgument& grad_value) {
        a.grad_key = matrix(grad_key), a.grad_value = matrix(grad_value);
        py::gil_scoped_release unlocked;
        kernels.second->attention_backward(a);
    });
    m.def("random_mask", [](Address out, int64_t batch_heads, int64_t queries, int64_t keys, int64_t seed,
                            uint32_t stream, int threshold, int threads) {
        py::gil_scoped_release unlocked;
        kernels.second->random_mask(
            {reinterpret_cast<uint8_t*>(out), batch_heads, queries, keys, uint64_t(seed), stream, threshold, threads});
    });
}
