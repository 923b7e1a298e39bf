// Matrix products of a warp: tiles in shared memory, and the operands that a warp loads from them into registers.
//
// float16 and bfloat16 use m16n8k16. float32 uses three m16n8k8 products on tf32: each number is split into the sum of
// two tf32 numbers. Of the four products of parts, only that of the two smaller parts is left out. This leaves a
// relative error of about 2^-22 per product. Tensor cores truncate sums instead of rounding them, so they add only
// these three products. All further float32 sums are ordinary additions.
//
// Accumulators have one layout for all types: element e of lane 4 * i + j is row i + e / 2 * 8, column 2 * j + e % 2 of
// a 16 x 8 tile. For float32, the summation index is permuted in the same way in both operands. Neighboring columns of
// an accumulator can then serve as an operand unchanged, and each load reads two neighboring numbers.
#pragma once

#include "primitives.cuh"

namespace sgalign::cuda {

template <class T>
constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;  // depth of one mma

template <class T>
struct OperandA {
    uint32_t words[4];
};
template <class T>
struct OperandB {
    uint32_t words[2];
};

// Rows of D elements in pieces of 16 bytes. The pieces are permuted within each row, so the accesses below use each
// bank once.
template <class T, int D>
struct Tile {
    static constexpr int kPiece = 16 / sizeof(T), kPieces = D / kPiece;
    T* data;

    __device__ static int swizzle(int row) {
        if constexpr (sizeof(T) == 2)
            return kPieces >= 8 ? row & 7 : kPieces == 4 ? row >> 1 & 3 : row >> 2 & 1;
        else  // serves accesses to rows i to i + 3 and to rows i, i + 2, i + 4, i + 6
            return kPieces >= 8 ? (((row ^ row >> 2) & 1) | (row & 2)) << 1 : (row >> 1 & 1) << 1;
    }
    // Callers add constants to rows with + and to columns with ^. The addresses then differ by compile-time constants.
    __device__ T* at(int row, int column) const {
        return data + row * D + ((column / kPiece) ^ swizzle(row)) * kPiece + column % kPiece;
    }
};

struct alignas(8) Pair {
    float x, y;
};

// A row of global memory that is copied to a row of a tile. If it is not `kept`, the row of the tile becomes zeros.
template <class T>
struct Row {
    const T* data;
    bool kept;
};

// Start copying `kRows` rows of `dim` elements with all threads of the block. Zeros fill each row up to D elements. A
// thread copies the same columns in all of its rows. `aligned` means that all rows begin at multiples of a piece and
// consist of whole pieces.
template <int kRows, int kThreads, class T, int D, class Source>
__device__ __forceinline__ void load_tile(Tile<T, D> tile, int dim, bool aligned, Source source) {
    constexpr int kPiece = Tile<T, D>::kPiece, kPieces = Tile<T, D>::kPieces;
    constexpr int kAcross = kThreads < kPieces ? kThreads : kPieces, kStep = kThreads / kAcross;
    const auto each = [&](int first_row, int first_piece, auto copy) {
        const int at = first_row + thread_index() / kAcross;
        const int column = (first_piece ^ (thread_index() % kAcross)) * kPiece;
        if (kRows % kStep && at >= kRows) return;
        const Row<T> row = source(at);
        copy(tile.at(at, column), row.data + column, row.kept ? dim - column : 0);
    };
    if (aligned) {
#pragma unroll(sizeof(T) == 2 ? 4 : 2)  // more unrolling spills registers, because it needs more addresses at once
        for (int row = 0; row < kRows; row += kStep)
#pragma unroll
            for (int piece = 0; piece < kPieces; piece += kAcross)
                each(row, piece, [](T* to, const T* from, int left) { copy_async(to, from, left > 0); });
    } else {
#pragma unroll 1
        for (int row = 0; row < kRows; row += kStep)
            for (int piece = 0; piece < kPieces; piece += kAcross)
                each(row, piece, [](T* to, const T* from, int left) {
                    for (int e = 0; e < kPiece; ++e) shared_store(to + e, e < left ? from[e] : T{});
                });
    }
}

// The 16 x depth operand whose first element is (row, column) of the tile.
template <class T, int D>
__device__ __forceinline__ OperandA<T> load_a(Tile<T, D> tile, int row, int column) {
    const int lane = lane_index();
    OperandA<T> a;
    if constexpr (sizeof(T) == 2) {
        load_matrices(a.words, tile.at(row + lane % 16, column ^ (lane / 16 * 8)));
    } else {
        for (int i = 0; i < 2; ++i) {
            const Pair pair = shared_load((const Pair*)tile.at(row + lane / 4 + 8 * i, column + lane % 4 * 2));
            a.words[i] = as_bits(pair.x), a.words[i + 2] = as_bits(pair.y);
        }
    }
    return a;
}

// The 16 x depth operand that is the transpose of the part of the tile whose first element is (row, column).
template <class T, int D>
__device__ __forceinline__ OperandA<T> load_a_transposed(Tile<T, D> tile, int row, int column) {
    const int lane = lane_index();
    OperandA<T> a;
    if constexpr (sizeof(T) == 2) {
        load_matrices_transposed(a.words, tile.at(row + lane % 8 + lane / 16 * 8, column ^ (lane / 8 % 2 * 8)));
    } else {
        for (int i = 0; i < 2; ++i)
            for (int k = 0; k < 2; ++k)
                a.words[i + 2 * k] = as_bits(shared_load(tile.at(row + lane % 4 * 2 + k, column + lane / 4 + 8 * i)));
    }
    return a;
}

// Two depth x 8 operands from rows `row` to `row` + 15 of the tile. With the operand a, they give a b^T for row-major a
// and b.
template <class T, int D>
__device__ __forceinline__ void load_b(Tile<T, D> tile, int row, int column, OperandB<T> (&b)[2]) {
    const int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
        uint32_t words[4];
        load_matrices(words, tile.at(row + lane % 8 + lane / 16 * 8, column ^ (lane / 8 % 2 * 8)));
        for (int i = 0; i < 2; ++i) b[i] = {{words[2 * i], words[2 * i + 1]}};
    } else {
        for (int i = 0; i < 2; ++i) {
            const Pair pair = shared_load((const Pair*)tile.at(row + lane / 4 + 8 * i, column + lane % 4 * 2));
            b[i] = {{as_bits(pair.x), as_bits(pair.y)}};
        }
    }
}

// Two depth x 8 operands from columns `column` to `column` + 15 of the tile. With the operand a, they give a b for
// row-major a and b.
template <class T, int D>
__device__ __forceinline__ void load_b_transposed(Tile<T, D> tile, int row, int column, OperandB<T> (&b)[2]) {
    const int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
        uint32_t words[4];
        load_matrices_transposed(words, tile.at(row + lane % 16, column ^ (lane / 16 * 8)));
        for (int i = 0; i < 2; ++i) b[i] = {{words[2 * i], words[2 * i + 1]}};
    } else {
        for (int i = 0; i < 2; ++i)
            for (int k = 0; k < 2; ++k)
                b[i].words[k] = as_bits(shared_load(tile.at(row + lane % 4 * 2 + k, column + lane / 4 + 8 * i)));
    }
}

// Convert kDepth / 8 neighboring accumulators to an operand.
template <class T>
__device__ __forceinline__ OperandA<T> operand_of(const float (*tiles)[4]) {
    if constexpr (sizeof(T) == 2)
        return {{pack<T>(tiles[0][0], tiles[0][1]), pack<T>(tiles[0][2], tiles[0][3]),
                 pack<T>(tiles[1][0], tiles[1][1]), pack<T>(tiles[1][2], tiles[1][3])}};
    else
        return {{as_bits(tiles[0][0]), as_bits(tiles[0][2]), as_bits(tiles[0][1]), as_bits(tiles[0][3])}};
}

// d += a b
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const OperandA<T>& a, const OperandB<T>& b) {
    if constexpr (sizeof(T) == 2) {
        mma(d, a.words, b.words, T{});
    } else {
        uint32_t large_a[4], small_a[4], large_b[2], small_b[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            large_a[i] = round_tf32(as_float(a.words[i]));
            small_a[i] = round_tf32(as_float(a.words[i]) - as_float(large_a[i]));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            large_b[i] = round_tf32(as_float(b.words[i]));
            small_b[i] = round_tf32(as_float(b.words[i]) - as_float(large_b[i]));
        }
        float product[4] = {};
        mma(product, small_a, large_b, T{});
        mma(product, large_a, small_b, T{});
        mma(product, large_a, large_b, T{});
#pragma unroll
        for (int i = 0; i < 4; ++i) d[i] += product[i];
    }
}

}  // namespace sgalign::cuda
