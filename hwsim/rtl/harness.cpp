// Runs layers through the verilated block_skip_array: what stands outside the design, and nothing of what is inside.
//
// Behind the load port a DRAM that holds the memory image; behind the fill port the expander, a behavioural model that gathers the
// words of a column tile from the layer's input matrix; behind the drain port an output buffer. Each port may stall at random.
//
// Jobs come on standard input, results go to standard output, both as 32-bit little-endian words that begin with the number of
// words that follow. `hwsim/rtl_simulator.py` writes and reads them; the order of the fields is there.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#include "Vblock_skip_array.h"
#include "verilated.h"
#if VM_TRACE
#include "verilated_vcd_c.h"
#endif

namespace {

constexpr int kRows = HWSIM_ROWS, kColumns = HWSIM_COLUMNS, kGk = HWSIM_G_K;
constexpr int kFillWords = HWSIM_FILL_WORDS, kDrainWords = HWSIM_DRAIN_WORDS, kActivationBits = HWSIM_ACTIVATION_BITS;
constexpr int kCounters = 13;
static_assert(kRows > 0);

// Ports of up to 64 bits are integers, wider ones arrays of words.
template <class T>
void put(T& port, int at, int bits, uint64_t value) {
    const uint64_t mask = ((1ull << bits) - 1) << at;
    port = static_cast<T>((port & ~mask) | ((value << at) & mask));
}
template <std::size_t N>
void put(VlWide<N>& port, int at, int bits, uint64_t value) {
    for (int b = 0; b < bits; ++b, ++at) {
        const uint32_t bit = 1u << (at % 32);
        if ((value >> b) & 1) port[at / 32] |= bit;
        else port[at / 32] &= ~bit;
    }
}
template <class T>
uint64_t get(const T& port, int at, int bits) {
    return (static_cast<uint64_t>(port) >> at) & ((1ull << bits) - 1);
}
template <std::size_t N>
uint64_t get(const VlWide<N>& port, int at, int bits) {
    uint64_t value = 0;
    for (int b = 0; b < bits; ++b, ++at) value |= static_cast<uint64_t>((port[at / 32] >> (at % 32)) & 1) << b;
    return value;
}

// Whether a port stalls in a cycle: share of 256. `hwsim.verify.stalls` is the same function.
uint32_t mixed(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}
bool stalls(uint32_t seed, uint32_t port, uint32_t cycle, uint32_t share) {
    return (mixed(seed + 0x9e3779b9u * port + 0x85ebca6bu * cycle) & 255u) < share;
}

struct Job {
    uint32_t groups, channels, m_blocks, k_blocks, k, n, type_bits, streams, sorted, relu, image_bytes, steps;
    uint32_t load_share, fill_share, drain_share, seed, limit;
    const uint32_t* step_table;
    const uint8_t* image;
    const int32_t* input;  // [groups][n][k]
};
constexpr int kJobFields = 17;

class Bench {
   public:
    explicit Bench(const char* trace_path) : context(new VerilatedContext) {
        context->randReset(2);  // registers that a reset leaves alone, and all memories, begin at random
        context->randSeed(1);
        context->traceEverOn(trace_path != nullptr);
        top.reset(new Vblock_skip_array(context.get()));
        top->clock = 0;
#if VM_TRACE
        if (trace_path != nullptr) {
            waves.reset(new VerilatedVcdC);
            top->trace(waves.get(), 99);
            waves->open(trace_path);
        }
#endif
    }
    ~Bench() {
        top->final();
#if VM_TRACE
        if (waves) waves->close();
#endif
    }

    std::vector<uint32_t> run(const Job& job) {
        describe(job);
        top->reset = 1;
        tick();
        tick();
        top->reset = 0;
        for (uint32_t s = 0; s < job.steps; ++s) {
            top->step_write = 1;
            top->step_index = s;
            for (int f = 0; f < 5; ++f) put(top->step_data, 32 * f, 32, job.step_table[5 * s + f]);
            tick();
        }
        top->step_write = 0;
        std::vector<uint32_t> result = {0, 0, 0, 0, 0};
        if (!load(job, result[1])) return result;
        result[0] = compute(job, result);
        return result;
    }

   private:
    void describe(const Job& job) {
        top->groups = job.groups;
        top->channels = job.channels;
        top->m_blocks = job.m_blocks;
        top->k_blocks = job.k_blocks;
        top->type_bits = job.type_bits;
        top->streams = job.streams;
        top->sorted = job.sorted;
        top->relu = job.relu;
        top->image_bytes = job.image_bytes;
        top->steps = job.steps;
        top->load_start = top->start = top->load_valid = top->fill_valid = top->drain_ready = top->step_write = 0;
    }

    void tick() {
        top->clock = 0;
        top->eval();
        dump();
        top->clock = 1;
        top->eval();
        dump();
    }

    void dump() {
#if VM_TRACE
        if (waves) waves->dump(time++);
#endif
    }

    bool load(const Job& job, uint32_t& cycles) {
        top->load_start = 1;
        tick();
        top->load_start = 0;
        for (cycles = 0; !top->load_done; ++cycles) {
            if (cycles == job.limit) return false;
            top->load_valid = top->load_request && !stalls(job.seed, 0, cycles, job.load_share);
            if (top->load_valid && top->load_address >= job.image_bytes) return false;
            // What is on the bus while nothing is valid must not matter.
            top->load_data = top->load_valid ? job.image[top->load_address] : static_cast<uint8_t>(mixed(cycles));
            tick();
        }
        top->load_valid = 0;
        return true;
    }

    uint32_t compute(const Job& job, std::vector<uint32_t>& result) {
        constexpr int32_t kUnwritten = INT32_MIN;
        std::vector<int32_t> output(static_cast<size_t>(job.groups) * job.channels * job.n, kUnwritten);
        std::vector<uint32_t> counters;
        uint32_t words = 0, segments = 0, status = 1;
        top->start = 1;
        tick();
        top->start = 0;
        for (uint32_t cycle = 0; !top->done; ++cycle) {
            if (cycle == job.limit) {
                status = 2;
                break;
            }
            top->fill_valid = !stalls(job.seed, 1, cycle, job.fill_share);
            if (top->fill_request) expand(job, cycle);
            top->drain_ready = !stalls(job.seed, 2, cycle, job.drain_share);
            if (top->drain_ready)
                for (int l = 0; l < kDrainWords; ++l) {
                    if (!get(top->drain_valid, l, 1)) continue;
                    const size_t channel = get(top->drain_channel, 32 * l, 32), place = get(top->drain_position, 32 * l, 32);
                    if (channel >= job.groups * job.channels || place >= job.n) status = 3;
                    else if (output[channel * job.n + place] != kUnwritten) status = 4;
                    else {
                        const int high = 32 - kActivationBits;
                        const uint32_t raw = get(top->drain_value, kActivationBits * l, kActivationBits);
                        output[channel * job.n + place] = static_cast<int32_t>(raw << high) >> high;
                        ++words;
                    }
                }
            tick();
            if (top->report_valid) {
                ++segments;
                for (int i = 0; i < kCounters; ++i) counters.push_back(get(top->report, 32 * i, 32));
            }
        }
        result[2] = static_cast<uint32_t>(top->layer_cycles);
        result[3] = words;
        result[4] = segments;
        result.insert(result.end(), counters.begin(), counters.end());
        for (int32_t y : output) result.push_back(static_cast<uint32_t>(y));
        return status;
    }

    // Positions of columns beyond the tile are noise: nothing of them may reach an output.
    void expand(const Job& job, uint32_t cycle) {
        for (int f = 0; f < kFillWords; ++f)
            for (int c = 0; c < kColumns; ++c)
                for (int i = 0; i < kGk; ++i) {
                    const size_t row = static_cast<size_t>(top->fill_column + f) * kGk + i;
                    const size_t place = static_cast<size_t>(top->fill_group) * job.n + top->fill_position + c;
                    uint32_t value = 0;
                    if (static_cast<uint32_t>(c) >= top->fill_width) value = mixed(cycle * 31 + c);
                    else if (row < job.k) value = static_cast<uint32_t>(job.input[place * job.k + row]);
                    const int at = ((f * kColumns + c) * kGk + i) * kActivationBits;
                    put(top->fill_data, at, kActivationBits, value & ((1ull << kActivationBits) - 1));
                }
    }

    std::unique_ptr<VerilatedContext> context;
    std::unique_ptr<Vblock_skip_array> top;
#if VM_TRACE
    std::unique_ptr<VerilatedVcdC> waves;
    uint64_t time = 0;
#endif
};

Job parse(const std::vector<uint32_t>& words) {
    Job job{};
    uint32_t* fields[kJobFields] = {&job.groups,     &job.channels,   &job.m_blocks,    &job.k_blocks, &job.k,     &job.n,
                                    &job.type_bits,  &job.streams,    &job.sorted,      &job.relu,     &job.image_bytes,
                                    &job.steps,      &job.load_share, &job.fill_share,  &job.drain_share, &job.seed, &job.limit};
    for (int i = 0; i < kJobFields; ++i) *fields[i] = words[i];
    job.step_table = words.data() + kJobFields;
    job.image = reinterpret_cast<const uint8_t*>(job.step_table + 5 * job.steps);
    job.input = reinterpret_cast<const int32_t*>(job.step_table + 5 * job.steps + (job.image_bytes + 3) / 4);
    return job;
}

}  // namespace

int main(int argc, char** argv) {
    Bench bench(argc > 1 ? argv[1] : nullptr);
    uint32_t count = 0;
    while (std::fread(&count, sizeof count, 1, stdin) == 1) {
        std::vector<uint32_t> words(count);
        if (std::fread(words.data(), sizeof(uint32_t), count, stdin) != count) return 2;
        const std::vector<uint32_t> result = bench.run(parse(words));
        count = static_cast<uint32_t>(result.size());
        std::fwrite(&count, sizeof count, 1, stdout);
        std::fwrite(result.data(), sizeof(uint32_t), result.size(), stdout);
        std::fflush(stdout);
    }
    return 0;
}
