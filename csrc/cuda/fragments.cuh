// Matrix products of a warp: tiles in shared memory, and the operands that a warp's registers hold of them.
//
// float16 and bfloat16 are multiplied by m16n8k16. float32 is multiplied by m16n8k8 on tf32, three times: each number
// is the sum of two tf32 numbers, and all but the product of the two smaller parts is added up, which leaves an error
// of 2^-22 a product. Tensor cores cut sums off instead of rounding them, so no more than that is added up there.
//
// Accumulators have one layout for all types: element e of lane 4 * i + j is row i + e / 2 * 8, column 2 * j + e % 2 of
// a 16 x 8 tile. Where float32 is concerned the summed-over index of every operand is permuted, so that neighbouring
// columns of an accumulator are an operand as they are, and so that two neighbouring numbers are loaded at once.
#pragma once

#include "primitives.cuh"

namespace sgalign::cuda {

template <class T>
constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;  // of one mma

template <class T>
struct OperandA {
    uint32_t words[4];
};
template <class T>
struct OperandB {
    uint32_t words[2];
};

// Rows of D elements in pieces of 16 bytes, whose places are permuted within a row so that the accesses below meet
// each bank once.
template <class T, int D>
struct Tile {
    static constexpr int kPiece = 16 / sizeof(T), kPieces = D / kPiece;
    T* data;

    __device__ static int swizzle(int row) {
        if constexpr (sizeof(T) == 2)
            return kPieces >= 8 ? row & 7 : kPieces == 4 ? row >> 1 & 3 : row >> 2 & 1;
        else  // rows i to i + 3 and rows i, i + 2, i + 4, i + 6 alike
            return kPieces >= 8 ? (((row ^ row >> 2) & 1) | (row & 2)) << 1 : (row >> 1 & 1) << 1;
    }
    // With constants added to rows by +, to columns by ^, addresses differ by what is known before the kernel runs.
    __device__ T* at(int row, int column) const {
        return data + row * D + ((column / kPiece) ^ swizzle(row)) * kPiece + column % kPiece;
    }
};

struct alignas(8) Pair {
    float x, y;
};

// Row of global memory that a row of a tile is a copy of, or zeros if it is not to be read.
template <class T>
struct Row {
    const T* data;
    bool kept;
};

// Starts to copy `kRows` rows of `dim` elements, zeros behind, with all threads of the block; a thread copies the same
// columns of each of its rows. `aligned`: the rows, and the number of columns, are whole pieces.
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
#pragma unroll(sizeof(T) == 2 ? 4 : 2)  // more addresses at once spill registers
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

// The 16 x depth operand that is the transpose of the tile's part with the first element (row, column).
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

// Two depth x 8 operands, of rows row to row + 15 of the tile: a b' for row-major a and b.
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

// Two depth x 8 operands, of columns column to column + 15 of the tile: a b for row-major a and b.
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

// kDepth / 8 neighbouring accumulators as an operand.
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
