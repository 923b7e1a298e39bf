// The Python module sgalign._C. It receives addresses, sizes and strides, which the Python functions have checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
// setup.py decides which of these are built.
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

// Return the kernels that this processor can run, fastest first.
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

// The numbers of a call, in order. They are passed as one flat list. For a small call, reading nested tuples with
// pybind11 would take longer than the computation.
class Arguments {
  public:
    explicit Arguments(const py::args& arguments) : arguments(arguments) {}

    int64_t integer() {
        const int64_t value = PyLong_AsLongLong(next());
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
    double number() {
        const double value = PyFloat_AsDouble(next());
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
    void* address() { return reinterpret_cast<void*>(Address(integer())); }  // null if there is no tensor

    // Read the address of a matrix and its strides in elements.
    Matrix matrix() {
        Matrix result{address(), integer(), integer(), integer()};
        integer();  // skip the last stride, which is 1
        return result;
    }

    bool done() const { return position == arguments.size(); }

  private:
    PyObject* next() {
        if (done()) throw std::invalid_argument("too few arguments");
        return PyTuple_GET_ITEM(arguments.ptr(), Py_ssize_t(position++));
    }

    const py::args& arguments;
    size_t position = 0;
};

// Read the numbers in the order of `_description` in sgalign/ops/_attention_backends.py. A forward call has no
// gradients.
Attention attention(const py::args& numbers) {
    Arguments next(numbers);
    Attention a;
    a.dtype = DType(next.integer());
    a.batch = next.integer(), a.heads = next.integer(), a.queries = next.integer(), a.dim = next.integer();
    a.keys = next.integer();
    a.key = next.matrix(), a.value = next.matrix();
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
    for (int i = 0; i < a.group_count; ++i) a.groups[i].query = next.matrix();
    Branch* each[2];
    for (int i = 0; i < branches; ++i) {
        QueryGroup& group = a.groups[a.group_count == 1 ? 0 : i];
        each[i] = &group.branches[group.count++];
        each[i]->out = next.matrix();
        each[i]->log_sum = next.address();
        each[i]->random = i == branches - 1;
    }
    if (!next.done()) {
        for (int i = 0; i < branches; ++i) each[i]->grad_out = next.matrix();
        for (int i = 0; i < a.group_count; ++i) a.groups[i].grad_query = next.matrix();
        a.grad_key = next.matrix(), a.grad_value = next.matrix();
    }
    return a;
}

// Read the numbers in the order of `_description` in sgalign/ops/relation.py. A forward call has no gradients.
RelationLogits relation_logits(const py::args& numbers) {
    Arguments next(numbers);
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

void check_pairs(const RelationLogits& a) {
    for (int64_t i = 0; i < 2 * a.relations; ++i)
        if (a.pairs[i] < 0 || a.pairs[i] >= a.objects)
            throw std::out_of_range("pairs must hold indices in [0, " + std::to_string(a.objects) + "), got " +
                                    std::to_string(a.pairs[i]) + " in row " + std::to_string(i / 2));
}

// Read the numbers in the order of `_description` in sgalign/ops/alignment.py.
AlignmentLoss alignment_loss(const py::args& numbers) {
    Arguments next(numbers);
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

#ifdef SGALIGN_CUDA
using QueueArgument = std::pair<int, Address>;  // device and stream

cuda::Queue queue(const QueueArgument& argument) { return {argument.first, reinterpret_cast<void*>(argument.second)}; }

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Define the CUDA counterparts of the functions for the CPU. Functions that launch kernels also take a queue, which
// is a device and one of its streams. Some also take the address of the seed in device memory and a workspace
// (csrc/cuda/kernels.h).
void define_cuda(py::module_& m) {
    m.def("cuda_attention_splits", &cuda::attention_splits);
    m.def("cuda_attention_forward",
          [](const Attention& a, Address seed, int splits, Address workspace, const QueueArgument& to) {
              py::gil_scoped_release unlocked;
              cuda::attention_forward(a, pointer<uint64_t>(seed), splits, pointer<float>(workspace), queue(to));
          });
    m.def("cuda_attention_backward",
          [](const Attention& a, Address seed, int splits, Address workspace, const QueueArgument& to) {
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
    m.def("cuda_relation_backward", [](const RelationLogits& a, Address orders, const QueueArgument& to) {
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
        "Return the instruction sets that this processor can run, fastest first.");
    m.def("instruction_set", [] { return kernels.instruction_set; }, "Return the instruction set in use.");
    m.def(
        "use_instruction_set",
        [](const std::string& name) {
            for (const Kernels& supported : supported_kernels())
                if (name == supported.instruction_set) {
                    kernels = supported;
                    return;
                }
            throw std::invalid_argument("the instruction set must be one that this processor supports, got '" + name +
                                        "'");
        },
        "Choose the instruction set of all later calls. Only tests need this.");

    py::class_<Attention>(m, "Attention", py::module_local()).def(py::init(&attention));
    m.def("attention_forward", [](const Attention& a) {
        py::gil_scoped_release unlocked;
        kernels.attention.forward(a);
    });
    m.def("attention_backward", [](const Attention& a) {
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
    m.def("relation_backward", [](const RelationLogits& a) {
        check_pairs(a);
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
