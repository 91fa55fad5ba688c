// One row of the array: its part of the four weight memories, front end, operand register, timing of its PEs, and the PEs.
//
// Rules 1 to 3 of docs/microarchitecture.md, section 3, meet here: everything acts on the state at the start of the cycle.
`include "mutants.svh"

module array_row #(
    parameter int COLUMNS = 4,
    parameter int G_O = 4,
    parameter int G_K = 4,
    parameter int MULTIPLIERS = 4,
    parameter int SIGN_ADDERS = 16,
    parameter int WINDOW = 4,
    parameter int QUEUE = 2,
    parameter int WEIGHT_BITS = 8,
    parameter int MAGNITUDE_BITS = 8,
    parameter int ACTIVATION_BITS = 8,
    parameter int ACCUMULATOR_BITS = 32,
    parameter int DENSE_PORT = 64,
    parameter int SIGN_PORT = 32,
    parameter int TYPE_BYTES = 64,
    parameter int SIGN_BYTES = 64,
    parameter int MAGNITUDE_BYTES = 64,
    parameter int DENSE_BYTES = 64,
    parameter int LANES = 1,
    parameter int MAX_TILES = 16,
    parameter int TILE_BITS = 4,
    parameter int COLUMN_BITS = 20
) (
    input  logic                                   clock,
    input  logic                                   reset,
    input  logic [1:0]                             type_bits,
    // Start of a segment and, with its first segment, of a pass.
    input  logic                                   segment_load,
    input  logic [COLUMN_BITS-1:0]                 segment_begin,
    input  logic [COLUMN_BITS-1:0]                 segment_end,
    input  logic                                   pass_load,
    input  logic [TILE_BITS-1:0]                   tile,
    input  logic                                   live,
    // Loading: bytes of the four streams; the row's directory, of which a field is a stream's base or (4) the block row.
    input  logic [4*LANES-1:0]                     write,
    input  logic [32*LANES-1:0]                    write_byte,
    input  logic [8*LANES-1:0]                     write_data,
    input  logic [LANES-1:0]                       directory_write,
    input  logic [2:0]                             directory_field,
    input  logic [LANES*TILE_BITS-1:0]             directory_tile,
    input  logic [32*LANES-1:0]                    directory_value,
    // Operands.
    output logic                                   request,
    output logic [COLUMN_BITS-1:0]                 request_column,
    input  logic                                   grant,
    input  logic [COLUMNS*G_K*ACTIVATION_BITS-1:0] granted_word,
    // Accumulators.
    input  logic                                   live_set,
    input  logic                                   switch_set,
    output logic [COLUMNS*G_O*ACCUMULATOR_BITS-1:0] drained,
    output logic [31:0]                            block_row,
    // Events and the class of this row-cycle: busy, imbalance, accept, fetch, conflict, starved.
    output logic                                   finished_next,
    output logic [COLUMN_BITS-1:0]                 examined,
    output logic [COLUMN_BITS-1:0]                 scanned,
    output logic                                   executes_unified,
    output logic                                   executes_dense,
    output logic [5:0]                             row_class
);
    localparam int N = G_O * G_K;
    localparam int WORD_BITS = COLUMNS * G_K * ACTIVATION_BITS;
    localparam int FACTOR_BITS = WEIGHT_BITS > MAGNITUDE_BITS + 1 ? WEIGHT_BITS : MAGNITUDE_BITS + 1;
    localparam int OUT_BITS = G_O > 1 ? $clog2(G_O) : 1;
    localparam int IN_BITS = G_K > 1 ? $clog2(G_K) : 1;
    localparam int MULTIPLIER_LANES = MULTIPLIERS < N ? MULTIPLIERS : N;
    localparam int ADDER_LANES = SIGN_ADDERS < N ? SIGN_ADDERS : N;

    function automatic int larger(input int a, input int b);
        larger = a > b ? a : b;
    endfunction
    function automatic int turns(input int work, input int width);
        turns = (work + width - 1) / width;
    endfunction

    // Occupancy: docs/microarchitecture.md, section 2.
    localparam int DENSE_CYCLES = larger(turns(N, MULTIPLIERS), turns(N * WEIGHT_BITS, DENSE_PORT));
    localparam int UNIFIED_CYCLES = larger(
        larger(turns(N, SIGN_ADDERS), turns(G_O, MULTIPLIERS)), turns(N + MAGNITUDE_BITS, SIGN_PORT));
    localparam int BUSY_BITS = $clog2(larger(DENSE_CYCLES, UNIFIED_CYCLES) + 2);

    logic [127:0] bases[0:MAX_TILES-1];
    logic [31:0] block_rows[0:MAX_TILES-1];
    logic [127:0] new_bases;
    logic [31:0] type_at;
    logic [2*WINDOW-1:0] raw, codes;
    logic [COLUMN_BITS-1:0] scan, scan_bit;
    logic queued, head_dense, scan_finished, scan_finished_next;
    logic operand_full, operand_dense, active_dense, first, execute;
    logic [WORD_BITS-1:0] operand, active;
    logic [BUSY_BITS-1:0] busy, busy_next;

    always_ff @(posedge clock) begin
        for (int l = 0; l < LANES; l++)
            if (directory_write[l]) begin
                if (directory_field[2]) block_rows[directory_tile[l*TILE_BITS+:TILE_BITS]] <= directory_value[32*l+:32];
                else bases[directory_tile[l*TILE_BITS+:TILE_BITS]][32*directory_field[1:0]+:32] <= directory_value[32*l+:32];
            end
        if (pass_load) begin
            type_at <= new_bases[31:0] << 3;
            `MUTANT(28, type_at <= (new_bases[31:0] << 3) + 32'd1;)
            block_row <= block_rows[tile];
            `MUTANT(29, block_row <= block_rows[0];)
        end
    end

    always_comb begin
        new_bases = bases[tile];
        `MUTANT(30, new_bases = bases[0];)
        // 2 bits a code, 1 bit where the layer has no DENSE block, none in a machine that runs everything as DENSE.
        scan_bit = type_bits[1] ? scan << 1 : scan;
        `MUTANT(31, scan_bit = scan;)
        for (int d = 0; d < WINDOW; d++)
            codes[2*d+:2] = type_bits == 2'd0 ? 2'd2 : type_bits == 2'd1 ? {1'b0, raw[d]} : raw[2*d+:2];
    end

    bit_memory #(.BYTES(TYPE_BYTES), .WIDTH(2 * WINDOW), .LANES(LANES)) type_memory (
        .clock, .write(write[LANES-1:0]), .write_byte, .write_data, .read_bit(type_at + 32'(scan_bit)), .read_data(raw));

    front_end #(.WINDOW(WINDOW), .QUEUE(QUEUE), .COLUMN_BITS(COLUMN_BITS)) skip (
        .clock, .reset, .segment_load, .segment_begin(live ? segment_begin : '0),
        .segment_end(live ? segment_end : '0), .scan, .codes, .pop(grant), .queued, .head_column(request_column),
        .head_dense, .finished(scan_finished), .finished_next(scan_finished_next), .examined, .scanned);

    always_comb begin
        execute = operand_full && busy <= BUSY_BITS'(1);
        `MUTANT(16, execute = operand_full && busy == '0;)
        request = queued && (!operand_full || execute);
        `MUTANT(17, request = queued && !operand_full;)
        executes_unified = execute && !operand_dense;
        executes_dense = execute && operand_dense;
        if (execute) busy_next = operand_dense ? BUSY_BITS'(DENSE_CYCLES) : BUSY_BITS'(UNIFIED_CYCLES);
        else busy_next = busy == '0 ? '0 : busy - 1'b1;
        `MUTANT(18, if (executes_dense) busy_next = busy_next + 1'b1;)
        `MUTANT(19, if (executes_dense) busy_next = busy_next - 1'b1;)
        `MUTANT(20, if (executes_unified) busy_next = busy_next + 1'b1;)
    end

    always_comb begin
        finished_next = scan_finished_next && !grant && (!operand_full || execute) && busy_next == '0;
        `MUTANT(21, finished_next = scan_finished_next && !grant && (!operand_full || execute);)
        if (busy != '0) row_class = 6'b000001;
        else if (scan_finished && !operand_full) row_class = 6'b000010;
        else if (operand_full) row_class = 6'b000100;
        else if (queued) row_class = grant ? 6'b001000 : 6'b010000;
        else row_class = 6'b100000;
        `MUTANT(22, if (row_class == 6'b001000) row_class = 6'b010000;)
        `MUTANT(23, if (row_class == 6'b000010) row_class = 6'b100000;)
        `MUTANT(24, if (busy == BUSY_BITS'(1) && operand_full) row_class = 6'b000100;)
    end

    always_ff @(posedge clock) begin
        if (grant) begin
            operand <= granted_word;
            operand_dense <= head_dense;
            `MUTANT(27, operand_dense <= head_dense || operand_dense;)
        end
        if (execute) begin
            active <= operand;
            `MUTANT(26, active <= granted_word;)
            active_dense <= operand_dense;
        end
        if (reset) begin
            operand_full <= 1'b0;
            busy <= '0;
            first <= 1'b0;
        end else begin
            operand_full <= grant || (operand_full && !execute);
            `MUTANT(25, operand_full <= grant || operand_full;)
            busy <= busy_next;
            first <= execute;
        end
    end

    logic [MULTIPLIER_LANES-1:0] lane_valid;
    logic [MULTIPLIER_LANES*FACTOR_BITS-1:0] lane_factor;
    logic [MULTIPLIER_LANES*OUT_BITS-1:0] lane_out;
    logic [MULTIPLIER_LANES*IN_BITS-1:0] lane_in;
    logic [ADDER_LANES-1:0] adder_valid, adder_negative;
    logic [ADDER_LANES*OUT_BITS-1:0] adder_out;
    logic [ADDER_LANES*IN_BITS-1:0] adder_in;

    weight_feed #(
        .G_O(G_O), .G_K(G_K), .MULTIPLIERS(MULTIPLIER_LANES), .SIGN_ADDERS(ADDER_LANES), .WEIGHT_BITS(WEIGHT_BITS),
        .MAGNITUDE_BITS(MAGNITUDE_BITS), .DENSE_PORT(DENSE_PORT), .SIGN_PORT(SIGN_PORT), .FACTOR_BITS(FACTOR_BITS),
        .OUT_BITS(OUT_BITS), .IN_BITS(IN_BITS), .BUSY_BITS(BUSY_BITS), .UNIFIED_CYCLES(UNIFIED_CYCLES),
        .LANES(LANES), .SIGN_BYTES(SIGN_BYTES), .MAGNITUDE_BYTES(MAGNITUDE_BYTES), .DENSE_BYTES(DENSE_BYTES)
    ) feed (
        .clock, .busy, .dense(active_dense), .first, .pass_load, .sign_base(new_bases[63:32]),
        .magnitude_base(new_bases[95:64]), .dense_base(new_bases[127:96]), .write(write[4*LANES-1:LANES]), .write_byte, .write_data,
        .lane_valid, .lane_factor, .lane_out, .lane_in, .adder_valid, .adder_negative, .adder_out, .adder_in);

    generate
        for (genvar c = 0; c < COLUMNS; c++) begin : g_pe
            pe #(
                .G_O(G_O), .G_K(G_K), .MULTIPLIERS(MULTIPLIER_LANES), .SIGN_ADDERS(ADDER_LANES),
                .FACTOR_BITS(FACTOR_BITS), .ACTIVATION_BITS(ACTIVATION_BITS), .ACCUMULATOR_BITS(ACCUMULATOR_BITS),
                .OUT_BITS(OUT_BITS), .IN_BITS(IN_BITS), .MAGNITUDE_BITS(MAGNITUDE_BITS), .SIGN_PORT(SIGN_PORT),
                .UNIFIED_CYCLES(UNIFIED_CYCLES)
            ) element (
                .clock, .dense(active_dense), .first,
                .word(active[c*G_K*ACTIVATION_BITS+:G_K*ACTIVATION_BITS]),
                .lane_valid, .lane_factor, .lane_out, .lane_in, .adder_valid, .adder_negative, .adder_out, .adder_in,
                .live_set, .switch_set, .drained(drained[c*G_O*ACCUMULATOR_BITS+:G_O*ACCUMULATOR_BITS]));
        end
    endgenerate
endmodule
