// Code that the kernels of all operations share: a matrix product that keeps its accumulators in registers, working
// memory for threads, and the dispatch on a dtype. It is in an unnamed namespace for the reason given in simd.h.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdlib>
#include <new>

#include "../kernels.h"
#include "simd.h"

namespace {

// Call `kernel` with a value of the type in which elements of `dtype` are stored.
template <class Kernel>
void with_type(sgalign::DType dtype, Kernel kernel) {
    switch (dtype) {
        case sgalign::DType::float32: return kernel(float());
        case sgalign::DType::float64: return kernel(double());
        case sgalign::DType::bfloat16: return kernel(BFloat16());
        case sgalign::DType::float16: return kernel(Half());
    }
}

// Convert `count` elements to the arithmetic type, and set the elements of `out` from `count` to `padded` to `fill`.
template <class T, class R = typename Storage<T>::R>
inline void read_row(const T* source, int64_t count, int64_t padded, R fill, R* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = Storage<T>::read(source[i]);
    for (int64_t i = count; i < padded; ++i) out[i] = fill;
}

inline int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Rows of a register tile, which is two vectors wide. AVX-512 has 32 registers, so its tile is larger.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
template <class R>
constexpr int kPanel = 2 * Real<R>::lanes;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class R>
inline int64_t round_to_panel(int64_t n) {
    return divide_up(n, kPanel<R>) * kPanel<R>;
}

// C [Rows, kPanel] (+)= A [Rows, depth] B [depth, kPanel]. The sum over `depth` starts from zero and is added to C at
// the end. Over many blocks of depth, the rounding error is far smaller than if each product were added to C directly.
template <class R, int Rows, bool accumulate>
inline void tile(int64_t depth, const R* a, int64_t a_row, int64_t a_step, const R* b, int64_t b_row, R* c,
                 int64_t c_row) {
    constexpr int lanes = Real<R>::lanes;
    Vector<R> sum[Rows][2] = {};
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_row) {
        const Vector<R> left = load(b), right = load(b + lanes);
#pragma GCC unroll 12
        for (int i = 0; i < Rows; ++i) {
            sum[i][0] += a[i * a_row] * left;
            sum[i][1] += a[i * a_row] * right;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
        R* out = c + i * c_row;
        store(out, accumulate ? load(out) + sum[i][0] : sum[i][0]);
        store(out + lanes, accumulate ? load(out + lanes) + sum[i][1] : sum[i][1]);
    }
}

template <class R, bool accumulate, int Rows = kTileRows - 1>
inline void last_tile(int64_t rows, int64_t depth, const R* a, int64_t a_row, int64_t a_step, const R* b, int64_t b_row,
                      R* c, int64_t c_row) {
    if constexpr (Rows > 0) {
        if (rows == Rows)
            tile<R, Rows, accumulate>(depth, a, a_row, a_step, b, b_row, c, c_row);
        else
            last_tile<R, accumulate, Rows - 1>(rows, depth, a, a_row, a_step, b, b_row, c, c_row);
    }
}

// The left operand A. `row` is its stride along the rows, and `step` along the depth. Exchanging the two transposes A.
template <class R>
struct Left {
    const R* data;
    int64_t row, step;
};

// B in panels of kPanel columns.
template <class R>
struct Right {
    const R* data;
    int64_t row, panel;
};

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; columns are whole panels.
template <class R, bool accumulate>
void multiply(int64_t rows, int64_t columns, int64_t depth, Left<R> a, Right<R> b, R* c, int64_t c_row) {
    for (int64_t column = 0; column < columns; column += kPanel<R>, b.data += b.panel) {
        int64_t i = 0;
        for (; i + kTileRows <= rows; i += kTileRows)
            tile<R, kTileRows, accumulate>(depth, a.data + i * a.row, a.row, a.step, b.data, b.row,
                                           c + i * c_row + column, c_row);
        last_tile<R, accumulate>(rows - i, depth, a.data + i * a.row, a.row, a.step, b.data, b.row,
                                 c + i * c_row + column, c_row);
    }
}

// Working memory for all threads, in one allocation made before the threads start.
class Scratch {
  public:
    Scratch(int64_t threads, int64_t bytes) : bytes_(divide_up(bytes, 4096) * 4096 + 64 * 7) {
        memory_ = (char*)malloc(size_t(threads * bytes_ + 64));
        if (!memory_) throw std::bad_alloc();
#ifdef SGALIGN_POISON
        memset(memory_, 0xff, size_t(threads * bytes_ + 64));  // NaN in every type
#endif
    }
    ~Scratch() { free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    char* of_thread(int64_t thread) const { return memory_ + thread * bytes_; }

  private:
    int64_t bytes_;
    char* memory_;
};

template <class R>
R* take(char*& cursor, int64_t count) {
    cursor = (char*)(((uintptr_t)cursor + 63) / 64 * 64);
    R* result = (R*)cursor;
    cursor += count * int64_t(sizeof(R));
    return result;
}

}  // namespace
