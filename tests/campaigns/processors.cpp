// Run recorded calls of the kernels on any processor, without Python and torch.
//
//     processors CALLS RESULTS [INSTRUCTION_SET]
//
// processors.py writes the calls. Each has 64-bit words, little-endian: the operation, the number of buffers, then of
// each buffer the bytes per element, the bytes and the content, then the number of arguments, and of each argument its
// kind and value. The results are the contents of all buffers after each call. If an instruction set is named, its
// kernels run even if the processor does not support them.
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/arguments.h"
#include "../../csrc/dispatch.h"

using namespace sgalign;

namespace {

enum Operation : uint64_t {
    kAttentionForward,
    kAttentionBackward,
    kRandomMask,
    kRelationForward,
    kRelationBackward,
    kAlignment
};
enum Kind : uint64_t { kInteger, kNumber, kAddress };

struct Closing {
    void operator()(FILE* file) const { fclose(file); }
};
using File = std::unique_ptr<FILE, Closing>;

File open_file(const char* path, const char* mode) {
    FILE* file = fopen(path, mode);
    if (!file) throw std::runtime_error(std::string("cannot open ") + path);
    return File(file);
}

// Reverse the bytes of each element if this processor is big-endian.
void order_bytes(char* data, size_t bytes, size_t element) {
    if constexpr (std::endian::native == std::endian::big)
        for (char* end = data + bytes; data < end; data += element)
            for (size_t i = 0; i < element / 2; ++i) std::swap(data[i], data[element - 1 - i]);
}

// Read a word, or return false at the end of the file.
bool read_word(FILE* file, uint64_t& word) {
    if (fread(&word, 8, 1, file) != 1) return false;
    order_bytes((char*)&word, 8, 8);
    return true;
}

uint64_t word(FILE* file) {
    uint64_t result;
    if (!read_word(file, result)) throw std::runtime_error("the file of calls ends early");
    return result;
}

struct Buffer {
    size_t element = 1, bytes = 0;
    std::unique_ptr<char[]> data;
};

// The arguments of a call. An address is the number of a buffer, from 1, times 2^40, plus an offset in bytes.
class Arguments {
  public:
    Arguments(FILE* file, std::vector<Buffer>& buffers) : buffers(buffers), left(word(file)), file(file) {}

    int64_t integer() { return int64_t(next(kInteger)); }
    double number() { return std::bit_cast<double>(next(kNumber)); }
    void* address() {
        const uint64_t value = next(kAddress);
        return value ? buffers.at((value >> 40) - 1).data.get() + (value & ((uint64_t(1) << 40) - 1)) : nullptr;
    }
    bool done() const { return left == 0; }

  private:
    uint64_t next(Kind expected) {
        const uint64_t kind = word(file), value = word(file);
        // A missing tensor is recorded as the integer 0.
        if (kind != expected && !(expected == kAddress && kind == kInteger && value == 0))
            throw std::runtime_error("an argument has another kind");
        --left;
        return value;
    }

    std::vector<Buffer>& buffers;
    uint64_t left;
    FILE* file;
};

RandomMask random_mask(Arguments& next) {
    RandomMask m;
    m.out = static_cast<uint8_t*>(next.address());
    m.batch_heads = next.integer(), m.queries = next.integer(), m.keys = next.integer();
    m.seed = uint64_t(next.integer()), m.stream = uint32_t(next.integer());
    m.threshold = int(next.integer()), m.threads = int(next.integer());
    return m;
}

void run(const Kernels& kernels, uint64_t operation, Arguments& next) {
    switch (operation) {
        case kAttentionForward: return kernels.attention.forward(attention(next));
        case kAttentionBackward: return kernels.attention.backward(attention(next));
        case kRandomMask: return kernels.attention.random_mask(random_mask(next));
        case kRelationForward: return kernels.relation.forward(relation_logits(next));
        case kRelationBackward: return kernels.relation.backward(relation_logits(next));
        case kAlignment: return kernels.alignment.loss(alignment_loss(next));
    }
    throw std::runtime_error("unknown operation");
}

Kernels choose(const std::string& name) {
    if (name.empty()) return supported_kernels().front();
    if (name == "baseline") return supported_kernels().back();
#ifdef SGALIGN_AVX2
    if (name == "avx2") return {"avx2", attention_avx2, relation_avx2, alignment_avx2};
#endif
#ifdef SGALIGN_AVX512
    if (name == "avx512") return {"avx512", attention_avx512, relation_avx512, alignment_avx512};
#endif
    throw std::runtime_error("unknown instruction set " + name);
}

void run_all(const char* calls, const char* results, const std::string& name) {
    const File input = open_file(calls, "rb"), output = open_file(results, "wb");
    const Kernels kernels = choose(name);
    printf("%s\n", kernels.instruction_set.c_str());
    fflush(stdout);
    uint64_t operation;
    while (read_word(input.get(), operation)) {
        std::vector<Buffer> buffers(word(input.get()));
        for (Buffer& buffer : buffers) {
            buffer.element = word(input.get()), buffer.bytes = word(input.get());
            buffer.data = std::make_unique<char[]>(buffer.bytes);
            if (fread(buffer.data.get(), 1, buffer.bytes, input.get()) != buffer.bytes)
                throw std::runtime_error("the file of calls ends early");
            order_bytes(buffer.data.get(), buffer.bytes, buffer.element);
        }
        Arguments next(input.get(), buffers);
        run(kernels, operation, next);
        for (Buffer& buffer : buffers) {
            order_bytes(buffer.data.get(), buffer.bytes, buffer.element);
            fwrite(buffer.data.get(), 1, buffer.bytes, output.get());
        }
    }
}

}  // namespace

int main(int count, char** words) {
    if (count < 3) return fprintf(stderr, "usage: processors CALLS RESULTS [INSTRUCTION_SET]\n"), 2;
    try {
        run_all(words[1], words[2], count > 3 ? words[3] : "");
    } catch (const std::exception& error) {
        fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
