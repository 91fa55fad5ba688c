// The block-skip array of docs/microarchitecture.md, sections 2 to 4: everything behind the fill port and the load port.
//
// Outside stand the DRAM (load port: a transfer is asked for with address and bytes; the DRAM sends load_count bytes in a cycle
// and says which cycle is the transfer's last), the expander (fill port: words of g_k × COLUMNS activations, activation k of
// column c at (c·g_k + k)·ACTIVATION_BITS, exact 0 beyond the reduction length) and the activation and output buffers, which the
// channel fills and empties. All ports may stall. The steps of a layer are a program that the host writes; its transfers are read
// in order from the program port.
`include "mutants.svh"

module block_skip_array #(
    parameter int ROWS = 4,
    parameter int COLUMNS = 4,
    parameter int G_O = 4,
    parameter int G_K = 4,
    parameter int MULTIPLIERS = 4,
    parameter int SIGN_ADDERS = 16,
    parameter int WINDOW = 4,
    parameter int QUEUE = 2,
    parameter int BANKS = 4,
    parameter int SEGMENT_WORDS = 16,
    parameter int FILL_WORDS = 1,
    parameter int DRAIN_WORDS = 4,
    parameter int DENSE_PORT = 64,
    parameter int SIGN_PORT = 32,
    parameter int WEIGHT_BITS = 8,
    parameter int MAGNITUDE_BITS = 8,
    parameter int ACTIVATION_BITS = 8,
    parameter int ACCUMULATOR_BITS = 32,
    // A row's private part of each memory.
    parameter int TYPE_BYTES = 64,
    parameter int SIGN_BYTES = 64,
    parameter int MAGNITUDE_BYTES = 64,
    parameter int DENSE_BYTES = 64,
    // Bytes that the DRAM brings in a cycle at most.
    parameter int LOAD_BYTES = 4,
    // Registers for the directory (row tiles of all groups), channel parameters and the program.
    parameter int MAX_TILES = 64,
    parameter int MAX_CHANNELS = 256,
    parameter int MAX_STEPS = 64,
    parameter int COLUMN_BITS = 20,
    parameter int COUNTER_BITS = 32
) (
    input  logic                                   clock,
    input  logic                                   reset,
    input  logic                                   start,
    output logic                                   step_done,
    output logic                                   done,
    output logic [63:0]                            layer_cycles,
    // The layer, held while it runs.
    input  logic [31:0]                            channels,
    input  logic [31:0]                            m_blocks,
    input  logic [COLUMN_BITS-1:0]                 k_blocks,
    input  logic [1:0]                             type_bits,
    input  logic [3:0]                             streams,
    input  logic                                   sorted,
    input  logic                                   relu,
    input  logic [31:0]                            steps,
    input  logic                                   step_write,
    input  logic [(MAX_STEPS > 1 ? $clog2(MAX_STEPS) : 1)-1:0] step_index,
    input  logic [223:0]                           step_data,
    // Program port: the transfer that comes next; parts and fields as the loader has them, an input or a store any other part.
    input  logic [2:0]                             transfer_part,
    input  logic [31:0]                            transfer_first,
    input  logic [31:0]                            transfer_place,
    input  logic [(MAX_TILES > 1 ? $clog2(MAX_TILES) : 1)-1:0] transfer_tile,
    input  logic [31:0]                            transfer_count,
    input  logic [31:0]                            transfer_address,
    input  logic [31:0]                            transfer_bytes,
    // Load port.
    output logic                                   load_request,
    output logic                                   load_weights,
    output logic                                   load_stores,
    output logic [31:0]                            load_address,
    output logic [31:0]                            load_bytes,
    input  logic [7:0]                             load_count,
    input  logic [8*LOAD_BYTES-1:0]                load_data,
    input  logic                                   load_last,
    // Fill port.
    output logic                                   fill_request,
    output logic [31:0]                            fill_group,
    output logic [31:0]                            fill_position,
    output logic [31:0]                            fill_width,
    output logic [COLUMN_BITS-1:0]                 fill_column,
    input  logic                                   fill_valid,
    input  logic [FILL_WORDS*COLUMNS*G_K*ACTIVATION_BITS-1:0] fill_data,
    // Drain port.
    input  logic                                   drain_ready,
    output logic [DRAIN_WORDS-1:0]                 drain_valid,
    output logic [DRAIN_WORDS*ACTIVATION_BITS-1:0] drain_value,
    output logic [DRAIN_WORDS*32-1:0]              drain_channel,
    output logic [DRAIN_WORDS*32-1:0]              drain_position,
    // Counters of the segment that has just ended.
    output logic                                   report_valid,
    output logic [13*COUNTER_BITS-1:0]             report
);
    localparam int TILE_BITS = MAX_TILES > 1 ? $clog2(MAX_TILES) : 1;
    localparam int CHANNEL_LANES = (LOAD_BYTES + 6) / 7;
    localparam int BANK_BITS = BANKS > 1 ? $clog2(BANKS) : 1;
    localparam int WORD_BITS = COLUMNS * G_K * ACTIVATION_BITS;
    localparam int ROW_ACCUMULATORS = COLUMNS * G_O * ACCUMULATOR_BITS;

    logic phase_start, phase_store, phase_half, store_ready, phase_done_next, inputs_arrived;
    logic [31:0] phase_weights, phase_inputs;

    channel dram (
        .clock, .reset, .phase_start, .phase_weights, .phase_inputs, .phase_store, .store_ready, .phase_done_next,
        .inputs_arrived, .request(load_request), .carries_weights(load_weights), .carries_outputs(load_stores),
        .transfer_last(load_last));

    always_comb begin
        load_address = transfer_address;
        load_bytes = transfer_bytes;
    end

    logic [4*ROWS*LOAD_BYTES-1:0] write;
    logic [32*LOAD_BYTES-1:0] write_byte, directory_value;
    logic [8*LOAD_BYTES-1:0] write_data;
    logic [ROWS*LOAD_BYTES-1:0] directory_write;
    logic [2:0] directory_field;
    logic [LOAD_BYTES*(TILE_BITS+1)-1:0] directory_tile;
    logic [CHANNEL_LANES-1:0] channel_write;
    logic [31:0] channel_index;
    logic [56*CHANNEL_LANES-1:0] channel_data;

    loader #(
        .ROWS(ROWS), .LANES(LOAD_BYTES), .CHANNEL_LANES(CHANNEL_LANES), .TILE_BITS(TILE_BITS), .MAX_CHANNELS(MAX_CHANNELS),
        .TYPE_BYTES(TYPE_BYTES), .SIGN_BYTES(SIGN_BYTES), .MAGNITUDE_BYTES(MAGNITUDE_BYTES), .DENSE_BYTES(DENSE_BYTES)
    ) load (
        .clock, .reset, .m_blocks, .streams, .sorted, .phase_start, .phase_half, .active(load_request && load_weights),
        .part(transfer_part), .first(transfer_first), .first_place(transfer_place), .first_tile(transfer_tile),
        .count(transfer_count), .address(transfer_address), .last(load_last), .load_count, .load_data, .write, .write_byte,
        .write_data, .directory_write, .directory_field, .directory_tile, .directory_value, .channel_write, .channel_index,
        .channel_data);

    logic counting, segment_load, pass_load, switch_set, live_set, half, segment_done, drain_start, drain_done_next;
    logic [COLUMN_BITS-1:0] segment_begin, segment_end, fill_left;
    logic [TILE_BITS:0] tile;
    logic [31:0] tile_rows, drain_group, drain_rows, drain_width, drain_origin;

    sequencer #(
        .ROWS(ROWS), .COLUMNS(COLUMNS), .SEGMENT_WORDS(SEGMENT_WORDS), .FILL_WORDS(FILL_WORDS), .MAX_STEPS(MAX_STEPS),
        .TILE_BITS(TILE_BITS), .COLUMN_BITS(COLUMN_BITS)
    ) sequence_passes (
        .clock, .reset, .start, .m_blocks, .k_blocks, .steps, .step_write, .step_index, .step_data,
        .rows_finished_next(&finished_next), .counting, .segment_load, .segment_begin, .segment_end, .pass_load, .tile,
        .tile_rows, .switch_set, .live_set, .half, .segment_done, .drain_start, .drain_group, .drain_rows, .drain_width,
        .drain_position(drain_origin), .drain_done_next, .phase_start, .phase_weights, .phase_inputs, .phase_store,
        .phase_half, .store_ready, .phase_done_next, .inputs_arrived, .fill_request, .fill_group, .fill_position, .fill_width,
        .fill_column, .fill_left, .fill_valid, .step_done, .done, .layer_cycles);

    logic [ROWS-1:0] request, grant, finished_next, unified, dense;
    logic [ROWS*COLUMN_BITS-1:0] request_column, examined, scanned;
    logic [ROWS*BANK_BITS-1:0] bank;
    logic [BANKS-1:0] bank_read;
    logic [BANKS*COLUMN_BITS-1:0] bank_column;
    logic [BANKS*WORD_BITS-1:0] bank_word;
    logic [FILL_WORDS-1:0] fill;
    logic [ROWS*ROW_ACCUMULATORS-1:0] accumulators;
    logic [ROWS*32-1:0] block_rows;
    logic [ROWS*6-1:0] row_class;

    arbiter #(.ROWS(ROWS), .BANKS(BANKS), .COLUMN_BITS(COLUMN_BITS), .BANK_BITS(BANK_BITS)) arbitrate (
        .request, .column(request_column), .grant, .bank, .bank_read, .bank_column);

    always_comb
        for (int f = 0; f < FILL_WORDS; f++) begin
            fill[f] = fill_request && fill_valid && COLUMN_BITS'(f) < fill_left;
            `MUTANT(69, fill[f] = fill_request && fill_valid;)
        end

    operand_store #(
        .BANKS(BANKS), .SEGMENT_WORDS(SEGMENT_WORDS), .FILL_WORDS(FILL_WORDS), .WORD_BITS(WORD_BITS),
        .COLUMN_BITS(COLUMN_BITS)
    ) store (.clock, .half, .segment_load, .segment_begin, .bank_column, .bank_word, .fill, .fill_column, .fill_data);

    generate
        for (genvar r = 0; r < ROWS; r++) begin : g_row
            array_row #(
                .COLUMNS(COLUMNS), .G_O(G_O), .G_K(G_K), .MULTIPLIERS(MULTIPLIERS), .SIGN_ADDERS(SIGN_ADDERS),
                .WINDOW(WINDOW), .QUEUE(QUEUE), .WEIGHT_BITS(WEIGHT_BITS), .MAGNITUDE_BITS(MAGNITUDE_BITS),
                .ACTIVATION_BITS(ACTIVATION_BITS), .ACCUMULATOR_BITS(ACCUMULATOR_BITS), .DENSE_PORT(DENSE_PORT),
                .SIGN_PORT(SIGN_PORT), .TYPE_BYTES(TYPE_BYTES), .SIGN_BYTES(SIGN_BYTES),
                .MAGNITUDE_BYTES(MAGNITUDE_BYTES), .DENSE_BYTES(DENSE_BYTES), .LANES(LOAD_BYTES),
                .MAX_TILES(2 * MAX_TILES), .TILE_BITS(TILE_BITS + 1), .COLUMN_BITS(COLUMN_BITS)
            ) row (
                .clock, .reset, .type_bits, .segment_load, .segment_begin, .segment_end, .pass_load,
                .tile, .live(32'(r) < tile_rows), .write(write[4*r*LOAD_BYTES+:4*LOAD_BYTES]), .write_byte, .write_data,
                .directory_write(directory_write[r*LOAD_BYTES+:LOAD_BYTES]), .directory_field, .directory_tile,
                .directory_value,
                .request(request[r]), .request_column(request_column[r*COLUMN_BITS+:COLUMN_BITS]), .grant(grant[r]),
                .granted_word(bank_word[32'(bank[r*BANK_BITS+:BANK_BITS])*WORD_BITS+:WORD_BITS]), .live_set, .switch_set,
                .drained(accumulators[r*ROW_ACCUMULATORS+:ROW_ACCUMULATORS]), .block_row(block_rows[r*32+:32]),
                .finished_next(finished_next[r]), .examined(examined[r*COLUMN_BITS+:COLUMN_BITS]),
                .scanned(scanned[r*COLUMN_BITS+:COLUMN_BITS]), .executes_unified(unified[r]), .executes_dense(dense[r]),
                .row_class(row_class[6*r+:6]));
        end
    endgenerate

    counters #(.ROWS(ROWS), .BANKS(BANKS), .COLUMN_BITS(COLUMN_BITS), .COUNTER_BITS(COUNTER_BITS)) count_events (
        .clock, .reset, .counting, .segment_done, .bank_read, .grant, .scanned, .examined, .unified, .dense, .row_class,
        .report_valid, .report);

    drain #(
        .ROWS(ROWS), .COLUMNS(COLUMNS), .G_O(G_O), .DRAIN_WORDS(DRAIN_WORDS), .ACCUMULATOR_BITS(ACCUMULATOR_BITS),
        .ACTIVATION_BITS(ACTIVATION_BITS), .CHANNEL_LANES(CHANNEL_LANES), .MAX_CHANNELS(MAX_CHANNELS)
    ) drain_outputs (
        .clock, .reset, .channels, .m_blocks, .relu, .channel_write, .channel_index, .channel_data, .start(drain_start),
        .group(drain_group), .live_rows(drain_rows), .width(drain_width), .position(drain_origin), .block_rows,
        .accumulators, .done_next(drain_done_next), .drain_ready, .drain_valid, .drain_value, .drain_channel,
        .drain_position);
endmodule
