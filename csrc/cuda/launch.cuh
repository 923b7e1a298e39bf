// The launch of a kernel. An error names the kernel and the shape.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "primitives.cuh"

namespace sgalign::cuda {

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `what` describes kernel and shape in error messages.
template <class Parameters>
void launch(const std::string& what, void (*kernel)(Parameters), int64_t blocks, int blocks_y, int threads,
            size_t shared_bytes, [[maybe_unused]] const Queue& queue, const Parameters& parameters) {
    if (blocks == 0 || blocks_y == 0) return;
    if (blocks > 0x7fffffff || blocks_y > 0xffff)
        throw std::runtime_error(what + ": " + std::to_string(blocks) + " x " + std::to_string(blocks_y) +
                                 " blocks exceed the limits of a grid");
#ifdef __CUDACC__
    const auto check = [&](cudaError_t error) {
        if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
    };
    // torch has already made this device current in its own CUDA runtime. The runtime that is linked into this module
    // may not know it yet.
    check(cudaSetDevice(queue.device));
    if (shared_bytes > 48 << 10)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
    kernel<<<dim3(unsigned(blocks), unsigned(blocks_y)), threads, shared_bytes, cudaStream_t(queue.stream)>>>(
        parameters);
    check(cudaGetLastError());
#else
    try {
        host::run_grid(kernel, blocks, blocks_y, threads, shared_bytes, parameters);
    } catch (const std::exception& error) {
        throw std::runtime_error(what + ": " + error.what());
    }
#endif
}

// Call `function` with a value of the type in which elements of `dtype` are stored.
template <class Function>
void with_type(DType dtype, Function function) {
    switch (dtype) {
        case DType::float32: return function(float{});
        case DType::bfloat16: return function(BFloat16{});
        case DType::float16: return function(Half{});
        case DType::float64: throw std::invalid_argument("the CUDA kernels do not support float64");
    }
}

}  // namespace sgalign::cuda
