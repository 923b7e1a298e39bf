// What the kernels use of a GPU, one function each: indices, barriers, shuffles, asynchronous copies, tensor cores.
//
// Compiled by nvcc these are single instructions (sm_80 and later). Any other compiler takes the same functions from
// tests/cuda/host_primitives.h, so that a kernel can be run, and its memory accesses checked, without a GPU.
#pragma once

#include <cstdint>

namespace sgalign {

// Bits of a number: the kernels compute in float32, and only convert.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

constexpr int kWarp = 32;

}  // namespace sgalign

#ifndef __CUDACC__
#include "host_primitives.h"
#else

namespace sgalign {

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int block_index() { return blockIdx.x; }
__device__ __forceinline__ int block_index_y() { return blockIdx.y; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarp; }

// A warp-uniform value, which the compiler can keep in one register for the warp.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, threadIdx.x / kWarp, 0); }

// The block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

// Access to shared memory goes through these, so that the host can check it.
template <class T>
__device__ __forceinline__ T shared_load(const T* address) {
    return *address;
}
template <class T>
__device__ __forceinline__ void shared_store(T* address, T value) {
    *address = value;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ uint32_t ballot(bool vote) { return __ballot_sync(~0u, vote); }

// Of two words, in one instruction; the compiler takes two for a product of numbers of 64 bits.
__device__ __forceinline__ uint64_t multiply_wide(uint32_t a, uint32_t b) {
    uint64_t result;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(result) : "r"(a), "r"(b));
    return result;
}
__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float value) { return __float_as_uint(value); }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory, or makes them zeros without reading any. Both addresses are multiples of 16. The
// copy is there after copies_wait() of the same thread.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool read) {
    asm volatile(
        "{ .reg .pred ignored; setp.eq.s32 ignored, %2, 0;\n"
        "cp.async.cg.shared.global [%0], [%1], 16, ignored; }" ::"r"(shared_address(to)),
        "l"(from), "r"(int(read))
        : "memory");
}
// The same for 4 bytes.
__device__ __forceinline__ void copy_word_async(void* to, const void* from, bool read) {
    asm volatile(
        "{ .reg .pred ignored; setp.eq.s32 ignored, %2, 0;\n"
        "cp.async.ca.shared.global [%0], [%1], 4, ignored; }" ::"r"(shared_address(to)),
        "l"(from), "r"(int(read))
        : "memory");
}
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements: lane 8 * m + i gives the address of row i of matrix m. Word m of each lane
// becomes elements (lane / 4, 2 * (lane % 4) and the next) of matrix m, or of its transpose.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d += a b for fragments of a 16 x 16 matrix a and a 16 x 8 matrix b.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same for a 16 x 8 and an 8 x 8 matrix of tf32.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// float32 rounded to the 11 significant bits of tf32, as bits of a float32.
__device__ __forceinline__ uint32_t round_tf32(float value) {
    uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
    return result;
}

// 2^value, off by 2^-22 of it at most. Subnormal numbers become 0.
__device__ __forceinline__ float fast_exp2(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
__device__ __forceinline__ float to_float(Half value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

// Two numbers rounded to T, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

}  // namespace sgalign
#endif

namespace sgalign {

template <class T>
__device__ __forceinline__ T from_float(float value) {
    if constexpr (sizeof(T) == 4)
        return value;
    else
        return {uint16_t(pack<T>(value, 0))};
}

}  // namespace sgalign
