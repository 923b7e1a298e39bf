// The Python module sgalign._C. It receives addresses, sizes and strides, which the Python functions have checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "dispatch.h"
#ifdef SGALIGN_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace sgalign;

namespace {

const std::vector<Kernels> supported = supported_kernels();
std::atomic<const Kernels*> kernels = &supported.front();  // those in use; one thread may choose while another computes

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

    bool done() const { return position == arguments.size(); }

  private:
    PyObject* next() {
        if (done()) throw std::invalid_argument("too few arguments");
        return PyTuple_GET_ITEM(arguments.ptr(), Py_ssize_t(position++));
    }

    const py::args& arguments;
    size_t position = 0;
};

template <class Call, Call (*read)(Arguments&)>
Call described(const py::args& numbers) {
    Arguments next(numbers);
    return read(next);
}

void check_pairs(const RelationLogits& a) {
    for (int64_t i = 0; i < 2 * a.relations; ++i)
        if (a.pairs[i] < 0 || a.pairs[i] >= a.objects)
            throw std::out_of_range("pairs must hold indices in [0, " + std::to_string(a.objects) + "), got " +
                                    std::to_string(a.pairs[i]) + " in row " + std::to_string(i / 2));
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

// Calls share only the choice of the kernels, so they need no global lock in a Python without one.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
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
            for (const Kernels& each : supported) names.push_back(each.instruction_set);
            return names;
        },
        "Return the instruction sets that this processor can run, fastest first.");
    m.def("instruction_set", [] { return kernels.load()->instruction_set; }, "Return the instruction set in use.");
    m.def(
        "use_instruction_set",
        [](const std::string& name) {
            for (const Kernels& each : supported)
                if (name == each.instruction_set) {
                    kernels = &each;
                    return;
                }
            throw std::invalid_argument("the instruction set must be one that this processor supports, got '" + name +
                                        "'");
        },
        "Choose the instruction set of all later calls. Only tests need this.");

    py::class_<Attention>(m, "Attention", py::module_local()).def(py::init(&described<Attention, attention>));
    m.def("attention_forward", [](const Attention& a) {
        py::gil_scoped_release unlocked;
        kernels.load()->attention.forward(a);
    });
    m.def("attention_backward", [](const Attention& a) {
        py::gil_scoped_release unlocked;
        kernels.load()->attention.backward(a);
    });
    m.def("random_mask", [](Address out, int64_t batch_heads, int64_t queries, int64_t keys, int64_t seed,
                            uint32_t stream, int threshold, int threads) {
        py::gil_scoped_release unlocked;
        kernels.load()->attention.random_mask(
            {reinterpret_cast<uint8_t*>(out), batch_heads, queries, keys, uint64_t(seed), stream, threshold, threads});
    });

    py::class_<RelationLogits>(m, "RelationLogits", py::module_local())
        .def(py::init(&described<RelationLogits, relation_logits>));
    m.def("relation_forward", [](const RelationLogits& a) {
        check_pairs(a);
        py::gil_scoped_release unlocked;
        kernels.load()->relation.forward(a);
    });
    m.def("relation_backward", [](const RelationLogits& a) {
        check_pairs(a);
        py::gil_scoped_release unlocked;
        kernels.load()->relation.backward(a);
    });

    py::class_<AlignmentLoss>(m, "AlignmentLoss", py::module_local())
        .def(py::init(&described<AlignmentLoss, alignment_loss>));
    m.def("alignment_loss", [](const AlignmentLoss& a) {
        py::gil_scoped_release unlocked;
        kernels.load()->alignment.loss(a);
    });

#ifdef SGALIGN_CUDA
    m.attr("cuda_archs") = SGALIGN_CUDA_ARCHS;
    define_cuda(m);
#endif
}
