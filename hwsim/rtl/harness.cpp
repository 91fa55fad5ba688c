// Runs layers through the verilated block_skip_array: what stands outside the design, and nothing of what is inside.
//
// Behind the load port a DRAM that holds the memory image and sends whole bursts at its exact rate; behind the fill port the
// activation buffer and the expander, a behavioural model that gathers the words of a column tile from the layer's input matrix;
// behind the drain port an output buffer. Each port may stall at random. A fill that needs an input cell which has not arrived, and a
// store of outputs which have not drained, are faults.
//
// Jobs come on standard input, results go to standard output, both as 32-bit little-endian words that begin with the number of
// words that follow. `hwsim/rtl_simulator.py` writes and reads them; the order of the fields is there.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "Vblock_skip_array.h"
#include "verilated.h"
#if VM_TRACE
#include "verilated_vcd_c.h"
#endif

namespace {

constexpr int kRows = HWSIM_ROWS, kColumns = HWSIM_COLUMNS, kGk = HWSIM_G_K;
constexpr int kFillWords = HWSIM_FILL_WORDS, kDrainWords = HWSIM_DRAIN_WORDS, kActivationBits = HWSIM_ACTIVATION_BITS,
              kLoadBytes = HWSIM_LOAD_BYTES;
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
    // The words of a job, in this order.
    uint32_t groups, channels, m_blocks, k_blocks, k, n, type_bits, streams, sorted, relu, image_bytes, steps, transfers;
    uint32_t load_share, fill_share, drain_share, seed, limit_low, limit_high;
    uint32_t burst_bytes, dram_cycles_low, dram_cycles_high, dram_bytes_low, dram_bytes_high;
    uint32_t taps, cells, inputs_whole, kept_ranges;
    const uint32_t* step_table;      // [steps][kStepFields], see rtl_simulator.py
    const uint32_t* transfer_table;  // [transfers][kTransferFields]
    const uint32_t* kept;            // [kept_ranges][2]: first input cell, cells
    const uint8_t* image;
    const int32_t* input;  // [groups][n][k]
    const int32_t* cell;   // [n][taps]: the input cell of each tap within its group, -1 for padding

    uint64_t limit() const { return limit_low | static_cast<uint64_t>(limit_high) << 32; }
    uint64_t dram_cycles() const { return dram_cycles_low | static_cast<uint64_t>(dram_cycles_high) << 32; }
    uint64_t dram_bytes() const { return dram_bytes_low | static_cast<uint64_t>(dram_bytes_high) << 32; }
};
constexpr int kJobFields = 28, kStepFields = 9, kTransferFields = 7;
static_assert(offsetof(Job, step_table) == kJobFields * sizeof(uint32_t));
enum StepField { kGroup, kFirstTile, kTiles, kStart, kPositions, kWeightTransfers, kInputTransfers, kOutputs, kKept };
enum TransferField { kPart, kFirst, kPlace, kTile, kCount, kAddress, kBytes };
enum Status { kEnded = 1, kTooLong, kOutside, kTwice, kNotArrived, kNotDrained, kWrongTransfer };

class Bench {
   public:
    Bench(int argc, char** argv) : context(new VerilatedContext) {
        context->commandArgs(argc, argv);  // +mutant=N
        const char* trace_path = nullptr;
        for (int i = 1; i < argc; ++i)
            if (argv[i][0] != '+') trace_path = argv[i];
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
            for (int f = 0; f < 7; ++f) put(top->step_data, 32 * f, 32, job.step_table[kStepFields * s + f]);
            tick();
        }
        top->step_write = 0;
        return compute(job);
    }

   private:
    void describe(const Job& job) {
        top->channels = job.channels;
        top->m_blocks = job.m_blocks;
        top->k_blocks = job.k_blocks;
        top->type_bits = job.type_bits;
        top->streams = job.streams;
        top->sorted = job.sorted;
        top->relu = job.relu;
        top->steps = job.steps;
        top->start = top->load_count = top->load_last = top->fill_valid = top->drain_ready = top->step_write = 0;
    }

    // Whether this cycle was the last of a step.
    bool tick() {
        top->clock = 0;
        top->eval();
        const bool step_done = top->step_done;
        dump();
        top->clock = 1;
        top->eval();
        dump();
        return step_done;
    }

    void dump() {
#if VM_TRACE
        if (waves) waves->dump(time++);
#endif
    }

    // What the DRAM does in a cycle: bytes at its exact rate, whole bursts to the end.
    uint32_t carry(const Job& job, uint64_t cycle) {
        top->load_count = static_cast<uint8_t>(mixed(cycle));  // noise unless the transfer is one of weights
        top->load_last = 0;
        for (int b = 0; b < kLoadBytes; ++b) put(top->load_data, 8 * b, 8, mixed(cycle * 131 + b) & 255u);
        const uint32_t* transfer = job.transfer_table + kTransferFields * carried;
        if (carried < job.transfers && shown != carried + 1) {
            top->transfer_part = transfer[kPart] & 7u;
            top->transfer_first = transfer[kFirst];
            top->transfer_place = transfer[kPlace];
            top->transfer_tile = transfer[kTile];
            top->transfer_count = transfer[kCount];
            top->transfer_address = transfer[kAddress];
            top->transfer_bytes = transfer[kBytes];
            shown = carried + 1;
            top->eval();
        }
        if (top->load_request && top->load_weights) top->load_count = 0;
        if (!top->load_request || stalls(job.seed, 0, cycle, job.load_share)) return 0;
        const bool weights = top->load_weights, stores = top->load_stores;
        if (carried == job.transfers || weights != (transfer[kPart] < 7) || stores != (transfer[kPart] == 8)) return kWrongTransfer;
        const uint64_t address = top->load_address, bytes = top->load_bytes;
        if (weights && address + bytes > job.image_bytes) return kWrongTransfer;
        if (stores && active == 0) {
            stored += job.step_table[kStepFields * stores_begun++ + kOutputs];
            if (drained < stored) return kNotDrained;
        }
        ++active;
        const uint64_t bus = (bytes + job.burst_bytes - 1) / job.burst_bytes * job.burst_bytes;
        const uint64_t last = (bus * job.dram_cycles() + job.dram_bytes() - 1) / job.dram_bytes();
        const uint64_t sent = active == last ? bytes : std::min(bytes, active * job.dram_bytes() / job.dram_cycles());
        if (weights) {
            for (uint64_t b = sent_before; b < sent; ++b)
                put(top->load_data, 8 * static_cast<int>(b - sent_before), 8, job.image[address + b]);
            top->load_count = static_cast<uint8_t>(sent - sent_before);
        }
        sent_before = sent;
        top->load_last = active == last;
        return 0;
    }

    // After a cycle with load_last: what it brought is there from the next cycle on.
    void transfer_ends(const Job& job) {
        const uint32_t* transfer = job.transfer_table + kTransferFields * carried;
        if (transfer[kPart] == 7)
            std::fill_n(arrived.begin() + transfer[kFirst], transfer[kCount], uint8_t{1});
        ++carried;
        active = sent_before = 0;
    }

    // The buffer keeps what the step that begins needs; everything else may be overwritten by the loads of the next.
    void step_begins(const Job& job, uint32_t step) {
        if (job.inputs_whole) return;
        std::vector<uint8_t> left(arrived.size(), 0);
        for (uint32_t r = 0; r < job.step_table[kStepFields * step + kKept]; ++r, ++kept) {
            const uint32_t first = job.kept[2 * kept], cells = job.kept[2 * kept + 1];
            std::copy_n(arrived.begin() + first, cells, left.begin() + first);
        }
        arrived.swap(left);
    }

    bool tile_arrived(const Job& job) const {
        for (uint32_t p = top->fill_position; p < top->fill_position + top->fill_width; ++p)
            for (uint32_t t = 0; t < job.taps; ++t) {
                const int32_t cell = job.cell[static_cast<size_t>(p) * job.taps + t];
                if (cell >= 0 && !arrived[static_cast<size_t>(top->fill_group) * job.cells + cell]) return false;
            }
        return true;
    }

    std::vector<uint32_t> compute(const Job& job) {
        constexpr int32_t kUnwritten = INT32_MIN;
        std::vector<int32_t> output(static_cast<size_t>(job.groups) * job.channels * job.n, kUnwritten);
        std::vector<uint32_t> counters, ends;
        uint32_t segments = 0, status = kEnded;
        arrived.assign(static_cast<size_t>(job.groups) * job.cells, 0);
        drained = stored = active = sent_before = 0;
        carried = shown = stores_begun = kept = 0;
        top->start = 1;
        tick();
        top->start = 0;
        for (uint64_t cycle = 0; !top->done && status == kEnded; ++cycle) {
            if (cycle == job.limit()) {
                status = kTooLong;
                break;
            }
            if (const uint32_t fault = carry(job, cycle)) {
                status = fault;
                break;
            }
            top->fill_valid = !stalls(job.seed, 1, cycle, job.fill_share);
            if (top->fill_request) {
                if (!tile_arrived(job)) status = kNotArrived;
                expand(job, cycle);
            }
            top->drain_ready = !stalls(job.seed, 2, cycle, job.drain_share);
            if (top->drain_ready)
                for (int l = 0; l < kDrainWords; ++l) {
                    if (!get(top->drain_valid, l, 1)) continue;
                    const size_t channel = get(top->drain_channel, 32 * l, 32), place = get(top->drain_position, 32 * l, 32);
                    if (channel >= job.groups * job.channels || place >= job.n) status = kOutside;
                    else if (output[channel * job.n + place] != kUnwritten) status = kTwice;
                    else {
                        const int high = 32 - kActivationBits;
                        const uint32_t raw = get(top->drain_value, kActivationBits * l, kActivationBits);
                        output[channel * job.n + place] = static_cast<int32_t>(raw << high) >> high;
                        ++drained_now;
                    }
                }
            const bool ends_transfer = top->load_last;
            if (tick()) {
                if (ends.size() < job.steps) step_begins(job, ends.size());
                ends.push_back(static_cast<uint32_t>(cycle + 1));
            }
            drained += drained_now;
            drained_now = 0;
            if (ends_transfer) transfer_ends(job);
            if (top->report_valid) {
                ++segments;
                for (int i = 0; i < kCounters; ++i) counters.push_back(get(top->report, 32 * i, 32));
            }
        }
        std::vector<uint32_t> result = {status, static_cast<uint32_t>(top->layer_cycles), static_cast<uint32_t>(drained), segments,
                                        static_cast<uint32_t>(ends.size())};
        result.insert(result.end(), ends.begin(), ends.end());
        result.insert(result.end(), counters.begin(), counters.end());
        for (int32_t y : output) result.push_back(static_cast<uint32_t>(y));
        return result;
    }

    // Positions of columns beyond the tile are noise: nothing of them may reach an output.
    void expand(const Job& job, uint64_t cycle) {
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
    std::vector<uint8_t> arrived;                  // input cells in the activation buffer
    uint64_t drained = 0, drained_now = 0, stored = 0;  // outputs
    uint64_t active = 0, sent_before = 0;          // of the transfer: cycles and bytes so far
    uint32_t carried = 0, shown = 0, stores_begun = 0, kept = 0;
#if VM_TRACE
    std::unique_ptr<VerilatedVcdC> waves;
    uint64_t time = 0;
#endif
};

Job parse(const std::vector<uint32_t>& words) {
    Job job{};
    std::memcpy(&job, words.data(), kJobFields * sizeof(uint32_t));
    const uint32_t* at = words.data() + kJobFields;
    const auto take = [&at](size_t count) {
        const uint32_t* part = at;
        at += count;
        return part;
    };
    job.step_table = take(static_cast<size_t>(kStepFields) * job.steps);
    job.transfer_table = take(static_cast<size_t>(kTransferFields) * job.transfers);
    job.kept = take(2 * static_cast<size_t>(job.kept_ranges));
    job.image = reinterpret_cast<const uint8_t*>(take((job.image_bytes + 3) / 4));
    job.input = reinterpret_cast<const int32_t*>(take(static_cast<size_t>(job.groups) * job.n * job.k));
    job.cell = reinterpret_cast<const int32_t*>(take(static_cast<size_t>(job.n) * job.taps));
    return job;
}

}  // namespace

int main(int argc, char** argv) {
    Bench bench(argc, argv);
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
