// A processing element: sign-controlled adders, multipliers shared by both paths, two sets of accumulators of one column.
//
// The row says what each lane does in this cycle; all PEs of a row do the same on their own activations.
// DENSE: multiplier lane l adds weight × x[lane_in] to accumulator lane_out.
// UNIFIED: adder lane l adds ±x[adder_in] to the sum of output adder_out; multiplier lane l adds magnitude × sum of output
// lane_out to its accumulator, once the sum is complete.
`include "mutants.svh"

module pe #(
    parameter int G_O = 4,
    parameter int G_K = 4,
    parameter int MULTIPLIERS = 4,
    parameter int SIGN_ADDERS = 16,
    parameter int FACTOR_BITS = 9,
    parameter int ACTIVATION_BITS = 8,
    parameter int ACCUMULATOR_BITS = 32,
    parameter int OUT_BITS = 2,
    parameter int IN_BITS = 2
) (
    input  logic                               clock,
    input  logic                               dense,
    input  logic                               first,
    input  logic [G_K*ACTIVATION_BITS-1:0]     word,
    input  logic [MULTIPLIERS-1:0]             lane_valid,
    input  logic [MULTIPLIERS*FACTOR_BITS-1:0] lane_factor,
    input  logic [MULTIPLIERS*OUT_BITS-1:0]    lane_out,
    input  logic [MULTIPLIERS*IN_BITS-1:0]     lane_in,
    input  logic [SIGN_ADDERS-1:0]             adder_valid,
    input  logic [SIGN_ADDERS-1:0]             adder_negative,
    input  logic [SIGN_ADDERS*OUT_BITS-1:0]    adder_out,
    input  logic [SIGN_ADDERS*IN_BITS-1:0]     adder_in,
    // The set that accumulates; at switch_set the other one starts from 0.
    input  logic                               live_set,
    input  logic                               switch_set,
    output logic [G_O*ACCUMULATOR_BITS-1:0]    drained
);
    localparam int SUM_BITS = ACTIVATION_BITS + $clog2(G_K) + 1;
    localparam int PRODUCT_BITS = SUM_BITS + FACTOR_BITS;
    localparam int WIDE = PRODUCT_BITS > ACCUMULATOR_BITS ? PRODUCT_BITS : ACCUMULATOR_BITS;

    logic [G_O*SUM_BITS-1:0] sums, sums_next;
    logic [G_O*ACCUMULATOR_BITS-1:0] accumulators[0:1];
    logic [G_O*ACCUMULATOR_BITS-1:0] updated;
    logic signed [ACTIVATION_BITS-1:0] x;
    logic signed [SUM_BITS-1:0] addend, operand;
    logic signed [FACTOR_BITS-1:0] factor;
    logic signed [PRODUCT_BITS-1:0] product;
    logic signed [WIDE-1:0] extended;
    logic [OUT_BITS-1:0] at;

    always_comb begin
        sums_next = first ? '0 : sums;
        `MUTANT(43, sums_next = sums;)
        x = '0;
        addend = '0;
        at = '0;
        for (int l = 0; l < SIGN_ADDERS; l++) begin
            x = word[32'(adder_in[l*IN_BITS+:IN_BITS])*ACTIVATION_BITS+:ACTIVATION_BITS];
            addend = adder_negative[l] ? -(SUM_BITS'(x)) : SUM_BITS'(x);
            `MUTANT(46, addend = adder_negative[l] ? ~(SUM_BITS'(x)) : SUM_BITS'(x);)
            at = adder_out[l*OUT_BITS+:OUT_BITS];
            if (adder_valid[l])
                sums_next[32'(at)*SUM_BITS+:SUM_BITS] = sums_next[32'(at)*SUM_BITS+:SUM_BITS] + addend;
        end
        updated = accumulators[live_set];
        operand = '0;
        factor = '0;
        product = '0;
        extended = '0;
        for (int l = 0; l < MULTIPLIERS; l++) begin
            at = lane_out[l*OUT_BITS+:OUT_BITS];
            x = word[32'(lane_in[l*IN_BITS+:IN_BITS])*ACTIVATION_BITS+:ACTIVATION_BITS];
            operand = dense ? SUM_BITS'(x) : sums_next[32'(at)*SUM_BITS+:SUM_BITS];
            `MUTANT(45, if (dense) operand = SUM_BITS'($signed(word[ACTIVATION_BITS-1:0]));)
            factor = lane_factor[l*FACTOR_BITS+:FACTOR_BITS];
            product = factor * operand;
            extended = WIDE'(product);
            if (lane_valid[l])
                updated[32'(at)*ACCUMULATOR_BITS+:ACCUMULATOR_BITS] =
                    updated[32'(at)*ACCUMULATOR_BITS+:ACCUMULATOR_BITS] + extended[ACCUMULATOR_BITS-1:0];
        end
        `MUTANT(47, for (int o = 0; o < G_O; o++)
            updated[(o+1)*ACCUMULATOR_BITS-1] = updated[(o+1)*ACCUMULATOR_BITS-2];)
        drained = accumulators[!live_set];
        `MUTANT(48, drained = accumulators[live_set];)
    end

    always_ff @(posedge clock) begin
        sums <= sums_next;
        accumulators[live_set] <= updated;
        if (switch_set) accumulators[!live_set] <= '0;
        `MUTANT(44, if (switch_set) accumulators[!live_set] <= accumulators[!live_set];)
    end

    generate
        if (WIDE > ACCUMULATOR_BITS) begin : g_wraps
            logic unused_high;  // sums wrap at the accumulator's width
            always_comb unused_high = &{1'b0, extended[WIDE-1:ACCUMULATOR_BITS]};
        end
    endgenerate
endmodule
