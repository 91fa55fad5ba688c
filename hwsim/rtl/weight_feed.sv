// What the multiplier and adder lanes of one row do in every cycle of a block, and the bits of the weights that they need.
//
// While a PE is busy, the dense port brings DENSE_PORT bits of a DENSE block in a cycle, the sign port SIGN_PORT bits (signs and
// magnitude packed) of a UNIFIED one; bits that are needed later are held. The multipliers work as late as the occupancy
// allows, the sign adders as soon as their bits are there.
//
// DENSE always fits: in cycle c (from 0) at most n·(c+1)/occ weights are needed, and as many have come.
// For UNIFIED the port brings either the signs first or the magnitude first, whichever lets all products be made in time. A
// machine in which neither does (multipliers and sign port both tight) needs more than this port; it is refused.
`include "mutants.svh"

module weight_feed #(
    parameter int G_O = 4,
    parameter int G_K = 4,
    parameter int MULTIPLIERS = 4,
    parameter int SIGN_ADDERS = 16,
    parameter int WEIGHT_BITS = 8,
    parameter int MAGNITUDE_BITS = 8,
    parameter int DENSE_PORT = 64,
    parameter int SIGN_PORT = 32,
    parameter int FACTOR_BITS = 9,
    parameter int OUT_BITS = 2,
    parameter int IN_BITS = 2,
    parameter int BUSY_BITS = 4,
    parameter int UNIFIED_CYCLES = 1,
    parameter int LANES = 1,
    parameter int SIGN_BYTES = 64,
    parameter int MAGNITUDE_BYTES = 64,
    parameter int DENSE_BYTES = 64
) (
    input  logic                               clock,
    input  logic [            BUSY_BITS-1:0]   busy,
    input  logic                               dense,
    input  logic                               first,
    // Start of a pass: where the row's parts of the streams begin.
    input  logic                               pass_load,
    input  logic [                    31:0]    sign_base,
    input  logic [                    31:0]    magnitude_base,
    input  logic [                    31:0]    dense_base,
    // Loading: bytes of sign, magnitude and dense stream.
    input  logic [             3*LANES-1:0]    write,
    input  logic [            32*LANES-1:0]    write_byte,
    input  logic [             8*LANES-1:0]    write_data,
    output logic [MULTIPLIERS-1:0]             lane_valid,
    output logic [MULTIPLIERS*FACTOR_BITS-1:0] lane_factor,
    output logic [MULTIPLIERS*OUT_BITS-1:0]    lane_out,
    output logic [MULTIPLIERS*IN_BITS-1:0]     lane_in,
    output logic [SIGN_ADDERS-1:0]             adder_valid,
    output logic [SIGN_ADDERS-1:0]             adder_negative,
    output logic [SIGN_ADDERS*OUT_BITS-1:0]    adder_out,
    output logic [SIGN_ADDERS*IN_BITS-1:0]     adder_in
);
    localparam int N = G_O * G_K;
    localparam int BLOCK_BITS = N * WEIGHT_BITS;
    localparam int DENSE_CHUNK = DENSE_PORT < BLOCK_BITS ? DENSE_PORT : BLOCK_BITS;
    localparam int SIGN_CHUNK = SIGN_PORT < N ? SIGN_PORT : N;
    localparam int MAGNITUDE_CHUNK = SIGN_PORT < MAGNITUDE_BITS ? SIGN_PORT : MAGNITUDE_BITS;

    function automatic int smaller(input int a, input int b);
        smaller = a < b ? a : b;
    endfunction

    // Whether every product finds its sum and its magnitude in time.
    function automatic bit in_time(input bit magnitude_first);
        int signs, magnitude, added, products;
        in_time = 1'b1;
        added = 0;
        for (int c = 0; c < UNIFIED_CYCLES; c++) begin
            if (magnitude_first) begin
                magnitude = smaller(MAGNITUDE_BITS, (c + 1) * SIGN_PORT);
                signs = smaller(N, (c + 1) * SIGN_PORT - magnitude);
            end else begin
                signs = smaller(N, (c + 1) * SIGN_PORT);
                magnitude = smaller(MAGNITUDE_BITS, (c + 1) * SIGN_PORT - signs);
            end
            added = smaller(added + SIGN_ADDERS, signs);
            products = G_O - MULTIPLIERS * (UNIFIED_CYCLES - 1 - c);
            if (products > 0 && (magnitude < MAGNITUDE_BITS || added < products * G_K)) in_time = 1'b0;
        end
    endfunction

    localparam bit MAGNITUDE_FIRST = !in_time(1'b0);
    generate
        if (MAGNITUDE_FIRST && !in_time(1'b1)) begin : g_refuse
            $error("the sign port cannot bring signs and magnitude in time for the multipliers");
        end
    endgenerate

    // Bits of the current block that have come, and those that come now.
    int dense_held, sign_held, magnitude_held, added;
    int dense_now, sign_now, magnitude_now, sign_have, added_before, added_now;
    int dense_before, sign_before, magnitude_before;
    logic [31:0] dense_at, sign_at, magnitude_at;
    logic [DENSE_CHUNK-1:0] dense_chunk;
    logic [SIGN_CHUNK-1:0] sign_chunk, sign_fresh;
    logic [MAGNITUDE_CHUNK-1:0] magnitude_chunk, magnitude_fresh;
    logic [BLOCK_BITS-1:0] weights, weights_held;
    logic [N-1:0] signs, signs_held;
    logic [MAGNITUDE_BITS-1:0] magnitude, magnitude_part;
    logic unified_active, dense_active;
    int item;

    bit_memory #(.BYTES(DENSE_BYTES), .WIDTH(DENSE_CHUNK), .LANES(LANES)) dense_memory (
        .clock, .write(write[2*LANES+:LANES]), .write_byte, .write_data, .read_bit(dense_at), .read_data(dense_chunk));
    bit_memory #(.BYTES(MAGNITUDE_BYTES), .WIDTH(MAGNITUDE_CHUNK), .LANES(LANES)) magnitude_memory (
        .clock, .write(write[LANES+:LANES]), .write_byte, .write_data, .read_bit(magnitude_at), .read_data(magnitude_chunk));
    bit_memory #(.BYTES(SIGN_BYTES), .WIDTH(SIGN_CHUNK), .LANES(LANES)) sign_memory (
        .clock, .write(write[LANES-1:0]), .write_byte, .write_data, .read_bit(sign_at), .read_data(sign_chunk));

    always_comb begin
        unified_active = busy != '0 && !dense;
        dense_active = busy != '0 && dense;
        dense_before = first ? 0 : dense_held;
        sign_before = first ? 0 : sign_held;
        magnitude_before = first ? 0 : magnitude_held;
        added_before = first ? 0 : added;
        dense_now = smaller(DENSE_CHUNK, BLOCK_BITS - dense_before);
        if (MAGNITUDE_FIRST) begin
            magnitude_now = smaller(MAGNITUDE_CHUNK, MAGNITUDE_BITS - magnitude_before);
            sign_now = smaller(smaller(SIGN_CHUNK, N - sign_before), SIGN_PORT - magnitude_now);
        end else begin
            sign_now = smaller(SIGN_CHUNK, N - sign_before);
            magnitude_now = smaller(smaller(MAGNITUDE_CHUNK, MAGNITUDE_BITS - magnitude_before), SIGN_PORT - sign_now);
        end
        // Of the dense chunk what lies beyond the block shifts out at the top; the others are cut to what the port brings now.
        weights = (first ? '0 : weights_held) | (BLOCK_BITS'(dense_chunk) << dense_before);
        `MUTANT(40, weights = weights_held | (BLOCK_BITS'(dense_chunk) << dense_before);)
        sign_fresh = sign_chunk & ~({SIGN_CHUNK{1'b1}} << sign_now);
        signs = (first ? '0 : signs_held) | (N'(sign_fresh) << sign_before);
        magnitude_fresh = magnitude_chunk & ~({MAGNITUDE_CHUNK{1'b1}} << magnitude_now);
        magnitude = (first ? '0 : magnitude_part) | (MAGNITUDE_BITS'(magnitude_fresh) << magnitude_before);
        `MUTANT(41, magnitude = magnitude_part | (MAGNITUDE_BITS'(magnitude_fresh) << magnitude_before);)
        sign_have = sign_before + sign_now;
        added_now = smaller(SIGN_ADDERS, sign_have - added_before);
    end

    always_comb begin
        for (int l = 0; l < MULTIPLIERS; l++) begin
            item = (dense ? N : G_O) - MULTIPLIERS * 32'(busy) + l;
            lane_valid[l] = busy != '0 && item >= 0;
            if (item < 0) item = 0;
            lane_out[l*OUT_BITS+:OUT_BITS] = OUT_BITS'(dense ? item / G_K : item);
            lane_in[l*IN_BITS+:IN_BITS] = IN_BITS'(item % G_K);
            lane_factor[l*FACTOR_BITS+:FACTOR_BITS] = dense
                ? FACTOR_BITS'($signed(weights[item*WEIGHT_BITS+:WEIGHT_BITS]))
                : FACTOR_BITS'(magnitude);
            `MUTANT(37, if (dense)
                lane_factor[l*FACTOR_BITS+:FACTOR_BITS] = FACTOR_BITS'(weights[item*WEIGHT_BITS+:WEIGHT_BITS]);)
            `MUTANT(38, if (!dense) lane_factor[l*FACTOR_BITS+:FACTOR_BITS] = FACTOR_BITS'($signed(magnitude));)
            `MUTANT(39, if (l == MULTIPLIERS - 1) lane_valid[l] = 1'b0;)
        end
    end

    int place;
    always_comb begin
        for (int l = 0; l < SIGN_ADDERS; l++) begin
            place = added_before + l;
            adder_valid[l] = unified_active && l < added_now;
            if (place >= N) place = 0;
            adder_negative[l] = signs[place];
            `MUTANT(32, adder_negative[l] = !signs[place];)
            adder_out[l*OUT_BITS+:OUT_BITS] = OUT_BITS'(place / G_K);
            adder_in[l*IN_BITS+:IN_BITS] = IN_BITS'(place % G_K);
            `MUTANT(33, adder_out[l*OUT_BITS+:OUT_BITS] = OUT_BITS'(place % G_O);
                adder_in[l*IN_BITS+:IN_BITS] = IN_BITS'(place / G_O);)
        end
    end

    always_ff @(posedge clock) begin
        if (dense_active) begin
            dense_held <= dense_before + dense_now;
            weights_held <= weights;
        end
        if (unified_active) begin
            sign_held <= sign_have;
            magnitude_held <= magnitude_before + magnitude_now;
            added <= added_before + added_now;
            signs_held <= signs;
            magnitude_part <= magnitude;
        end
        if (pass_load) begin
            dense_at <= dense_base << 3;
            `MUTANT(35, dense_at <= (dense_base << 3) + 32'd1;)
            sign_at <= sign_base << 3;
            `MUTANT(36, sign_at <= (sign_base << 3) + 32'd1;)
            magnitude_at <= magnitude_base << 3;
        end else begin
            if (dense_active) dense_at <= dense_at + dense_now;
            if (unified_active) begin
                sign_at <= sign_at + sign_now;
                magnitude_at <= magnitude_at + magnitude_now;
                `MUTANT(34, magnitude_at <= magnitude_at;)
            end
        end
    end
endmodule
