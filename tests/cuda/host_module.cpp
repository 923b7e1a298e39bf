// The rest of the test module: functions that run one primitive each, and the empty CPU kernels that csrc/bindings.cpp
// needs.
#include "../../csrc/cuda/launch.cuh"

namespace sgalign {

extern const AttentionKernels attention_baseline;
extern const RelationKernels relation_baseline;
extern const AlignmentKernels alignment_baseline;
const AttentionKernels attention_baseline{};
const RelationKernels relation_baseline{};
const AlignmentKernels alignment_baseline{};

namespace {

// The input words and the output words of all lanes.
struct Lanes {
    const uint32_t* in;
    uint32_t* out;
    int type;
};

template <class T>
void mma_kernel(Lanes lanes) {
    const uint32_t* in = lanes.in + 10 * lane_index();
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
    float d[4] = {as_float(in[6]), as_float(in[7]), as_float(in[8]), as_float(in[9])};
    mma(d, a, b, T{});
    for (int i = 0; i < 4; ++i) lanes.out[4 * lane_index() + i] = as_bits(d[i]);
}

// Load four matrices of 8 rows of 16 bytes, one after the other. If the type is 1, transpose them.
void load_matrices_kernel(Lanes lanes) {
    uint32_t* const shared = (uint32_t*)shared_memory();
    copy_async(shared + 4 * lane_index(), lanes.in + 4 * lane_index(), true);
    copies_wait();
    sync_block();
    uint32_t words[4];
    if (lanes.type)
        load_matrices_transposed(words, shared + 4 * lane_index());
    else
        load_matrices(words, shared + 4 * lane_index());
    for (int i = 0; i < 4; ++i) lanes.out[4 * lane_index() + i] = words[i];
}

// Convert one float32 per lane, and exchange values between lanes.
void convert_kernel(Lanes lanes) {
    const float value = as_float(lanes.in[lane_index()]);
    uint32_t* const out = lanes.out + 7 * lane_index();
    out[0] = pack<Half>(value, -value);
    out[1] = pack<BFloat16>(value, -value);
    out[2] = as_bits(to_float(Half{uint16_t(out[0])}));
    out[3] = round_tf32(value);
    out[4] = as_bits(shuffle_xor(value, 5));
    out[5] = ballot(value > 0);
    out[6] = as_bits(fast_exp2(value));
}

// Make one of the mistakes that the emulation must find.
void mistake_kernel(Lanes lanes) {
    uint32_t* const shared = (uint32_t*)shared_memory();
    const int i = thread_index();
    switch (lanes.type) {
        case 0:  // no mistake
            shared_store(shared + i, 1u);
            sync_block();
            lanes.out[i % 32] = shared_load(shared + (i ^ 32));
            break;
        case 1:  // reads a value of the other warp without a barrier
            shared_store(shared + i, 1u);
            sync_warp();
            lanes.out[i % 32] = shared_load(shared + (i ^ 32));
            break;
        case 2:  // reads the value of a neighboring lane without a barrier of the warp
            shared_store(shared + i, 1u);
            shuffle_xor(0, 1);
            lanes.out[i % 32] = shared_load(shared + (i ^ 1));
            break;
        case 3:  // writes again while the other warp may still read
            shared_store(shared + i, 1u);
            sync_block();
            lanes.out[i % 32] = shared_load(shared + (i ^ 32));
            shared_store(shared + i, 2u);
            break;
        case 4:  // one lane calls another operation
            if (i == 7)
                sync_warp();
            else
                shuffle_xor(0, 1);
            break;
        case 5:  // one warp calls one barrier too many
            if (i < 32) sync_block();
            break;
        case 6:  // reads before the copy has arrived
            copy_async(shared + 4 * i, lanes.in, true);
            lanes.out[i % 32] = shared_load(shared + 4 * i);
            copies_wait();
            break;
        case 7: copy_async(shared + 4 * i, lanes.in, true); break;  // never waits for the copy
        case 8:                                                     // the address is not a multiple of 16
            copy_async(shared + 4 * i + 1, lanes.in, true);
            copies_wait();
            break;
        case 9:  // lane 1 writes after lanes 0 and 1 have read
            if (i < 2) lanes.out[i] = shared_load(shared);
            if (i == 1) shared_store(shared, 1u);
            break;
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void run_mma(int type, const uint32_t* in, uint32_t* out) {
    void (*const kernels[])(Lanes) = {mma_kernel<Half>, mma_kernel<BFloat16>, mma_kernel<float>};
    cuda::launch("mma", kernels[type], 1, 1, 32, 0, {}, Lanes{in, out, 0});
}
EXPORT void run_load_matrices(int transposed, const uint32_t* in, uint32_t* out) {
    cuda::launch("load_matrices", load_matrices_kernel, 1, 1, 32, 512, {}, Lanes{in, out, transposed});
}
EXPORT void run_convert(const uint32_t* in, uint32_t* out) {
    cuda::launch("convert", convert_kernel, 1, 1, 32, 0, {}, Lanes{in, out, 0});
}
// Make a mistake and write the resulting error to `message`, or an empty string if there is none.
EXPORT void run_mistake(int which, const uint32_t* in, uint32_t* out, char* message) {
    message[0] = 0;
    try {
        cuda::launch("mistake", mistake_kernel, 1, 1, 64, 2048, {}, Lanes{in, out, which});
    } catch (const std::exception& error) {
        strncpy(message, error.what(), 199);
    }
}

}  // namespace sgalign
