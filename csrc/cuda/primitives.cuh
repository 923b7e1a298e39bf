// The GPU features that the kernels use, one function each: indices, barriers, shuffles, asynchronous copies, tensor
// cores.
//
// nvcc compiles most of these functions to a single instruction (sm_80 and later). All other compilers get the same
// functions from tests/cuda/host_primitives.h, which runs the kernels and checks their memory accesses without a GPU.
#pragma once

#include <cstdint>

namespace sgalign {

// The bits of a 16-bit number. The kernels pass these numbers to the tensor cores or convert them to float32.
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

// The shuffle tells the compiler that the value is uniform, so it can keep one register for the whole warp.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, threadIdx.x / kWarp, 0); }

// The block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

// All accesses to shared memory use these two functions, which lets the emulation on the host check them.
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

// The product of two words in one instruction. For a product of 64-bit numbers the compiler uses two.
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

// Start copying 16 bytes to shared memory. If `read` is false, zeros are written instead. Both addresses must be
// multiples of 16. The copy is complete after the same thread has called copies_wait().
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

// Load four 8 x 8 matrices of 16-bit elements. Lane 8 * m + i passes the address of row i of matrix m. Word m of each
// lane receives two neighboring elements of row lane / 4 of matrix m, or of its transpose, from column 2 * (lane % 4).
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

// 2^value, with a relative error of at most 2^-22. Subnormal numbers become 0.
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

// Two numbers rounded to T in one word. The first is in the low half.
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
