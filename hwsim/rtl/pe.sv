// A processing element: sign-controlled adder tree, multipliers shared by both paths, two sets of accumulators of one column.
//
// The row says what each lane does in this cycle; all PEs of a row do the same on their own activations.
// DENSE: multiplier lane l adds weight × x[lane_in] to accumulator lane_out.
// UNIFIED: adder lane l adds ±x[adder_in] to the sum of output adder_out; multiplier lane l adds magnitude × sum of output
// lane_out to its accumulator, once the sum is complete.
//
// Weight feed and PE agree on which places a lane can be told at all (`…_PLACES`): a lane that works on one output only has
// no multiplexer. With UNIFIED_PATH 0 it is the PE of a dense machine: no adder lanes, and as many accumulator adders as
// outputs are updated in a cycle.
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
    parameter int IN_BITS = 2,
    parameter int MAGNITUDE_BITS = 8,
    parameter int SIGN_PORT = 32,
    parameter int UNIFIED_CYCLES = 1,
    parameter bit UNIFIED_PATH = 1'b1
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
    localparam int N = G_O * G_K;
    localparam int SUM_BITS = ACTIVATION_BITS + $clog2(G_K) + 1;
    localparam int OPERAND_BITS = UNIFIED_PATH ? SUM_BITS : ACTIVATION_BITS;
    localparam int PRODUCT_BITS = OPERAND_BITS + FACTOR_BITS;
    localparam int TREE = common_divisor(G_K, MULTIPLIERS);  // neighbouring lanes that always work on one output
    localparam int TREES = MULTIPLIERS / TREE;
    localparam int TREE_BITS = PRODUCT_BITS + $clog2(TREE);
    localparam int WIDE = TREE_BITS > ACCUMULATOR_BITS ? TREE_BITS : ACCUMULATOR_BITS;
    // Shared adders pay where they are half as many as the outputs; with as many there is nothing to choose.
    localparam bit ONE_ADDER_PER_TREE = !UNIFIED_PATH && (TREE == G_K || TREE == MULTIPLIERS)
        && (2 * TREES <= G_O || TREES >= G_O);

    function automatic int common_divisor(input int a, input int b);
        common_divisor = 1;
        for (int d = 2; d <= a; d++) if (a % d == 0 && b % d == 0) common_divisor = d;
    endfunction

    // Outputs (inputs) of a block that a lane can be told; lane l's are bits l·G_O … (l·G_K …).
    function automatic logic [MULTIPLIERS*G_O-1:0] dense_outputs();
        dense_outputs = '0;
        for (int l = 0; l < MULTIPLIERS; l++)
            for (int item = (N + l) % MULTIPLIERS; item < N; item = item + MULTIPLIERS)
                dense_outputs[l*G_O+item/G_K] = 1'b1;
    endfunction
    function automatic logic [MULTIPLIERS*G_K-1:0] dense_inputs();
        dense_inputs = '0;
        for (int l = 0; l < MULTIPLIERS; l++)
            for (int item = (N + l) % MULTIPLIERS; item < N; item = item + MULTIPLIERS)
                dense_inputs[l*G_K+item%G_K] = 1'b1;
    endfunction
    function automatic logic [MULTIPLIERS*G_O-1:0] unified_outputs();
        unified_outputs = '0;
        for (int l = 0; l < MULTIPLIERS; l++)
            for (int o = (G_O + l) % MULTIPLIERS; o < G_O; o = o + MULTIPLIERS) unified_outputs[l*G_O+o] = 1'b1;
    endfunction
    // The places of a block that adder lanes take as the signs come, behind the magnitude or before it: lane l's are bits l·N ….
    function automatic logic [SIGN_ADDERS*N-1:0] adder_places();
        int signs, added;
        adder_places = '0;
        for (int behind = 0; behind < 2; behind++) begin
            added = 0;
            for (int c = 1; c <= UNIFIED_CYCLES; c++) begin
                signs = c * SIGN_PORT;
                if (behind == 1) signs = signs > MAGNITUDE_BITS ? signs - MAGNITUDE_BITS : 0;
                if (signs > N) signs = N;
                for (int l = 0; l < SIGN_ADDERS; l++)
                    if (added + l < signs) adder_places[l*N+added+l] = 1'b1;
                added = added + SIGN_ADDERS < signs ? added + SIGN_ADDERS : signs;
            end
        end
    endfunction

    localparam logic [MULTIPLIERS*G_O-1:0] DENSE_OUTPUTS = dense_outputs();
    localparam logic [MULTIPLIERS*G_K-1:0] DENSE_INPUTS = dense_inputs();
    localparam logic [MULTIPLIERS*G_O-1:0] UNIFIED_OUTPUTS = unified_outputs();
    localparam logic [SIGN_ADDERS*N-1:0] ADDER_PLACES = adder_places();

    logic [G_O*SUM_BITS-1:0] sums;
    logic [MULTIPLIERS*PRODUCT_BITS-1:0] products;
    logic [TREES*TREE_BITS-1:0] trees;
    logic [G_O*ACCUMULATOR_BITS-1:0] accumulators[0:1];
    logic [G_O*ACCUMULATOR_BITS-1:0] live, updated;

    always_comb begin
        live = accumulators[live_set];
        drained = accumulators[!live_set];
        `MUTANT(48, drained = accumulators[live_set];)
    end

    generate
        if (UNIFIED_PATH) begin : g_sums
            logic [G_O*SUM_BITS-1:0] held;
            logic [SIGN_ADDERS*ACTIVATION_BITS-1:0] taken;
            logic [SUM_BITS-1:0] sum, signed_x;
            logic hit, any;

            always_comb begin
                taken = '0;
                for (int l = 0; l < SIGN_ADDERS; l++) begin
                    any = 1'b0;
                    for (int p = 0; p < N; p++)
                        if (ADDER_PLACES[l*N+p]) begin
                            if (!any || (adder_out[l*OUT_BITS+:OUT_BITS] == OUT_BITS'(p / G_K)
                                && adder_in[l*IN_BITS+:IN_BITS] == IN_BITS'(p % G_K)))
                                taken[l*ACTIVATION_BITS+:ACTIVATION_BITS] = word[(p%G_K)*ACTIVATION_BITS+:ACTIVATION_BITS];
                            any = 1'b1;
                        end
                end
                // −x is ~x + 1.
                signed_x = '0;
                for (int o = 0; o < G_O; o++) begin
                    sum = first || UNIFIED_CYCLES == 1 ? '0 : held[o*SUM_BITS+:SUM_BITS];
                    `MUTANT(43, sum = held[o*SUM_BITS+:SUM_BITS];)
                    for (int l = 0; l < SIGN_ADDERS; l++)
                        if (|ADDER_PLACES[l*N+o*G_K+:G_K]) begin
                            hit = adder_valid[l] && adder_out[l*OUT_BITS+:OUT_BITS] == OUT_BITS'(o);
                            signed_x = SUM_BITS'($signed(taken[l*ACTIVATION_BITS+:ACTIVATION_BITS]))
                                ^ {SUM_BITS{adder_negative[l]}};
                            sum = sum + (hit ? signed_x : '0) + SUM_BITS'(hit && adder_negative[l]);
                            `MUTANT(46, sum = sum - SUM_BITS'(hit && adder_negative[l]);)
                        end
                    sums[o*SUM_BITS+:SUM_BITS] = sum;
                end
            end

            always_ff @(posedge clock) held <= sums;
        end else begin : g_no_sums
            always_comb sums = '0;
        end
    endgenerate

    logic [ACTIVATION_BITS-1:0] x;
    logic [SUM_BITS-1:0] of_output;
    logic signed [OPERAND_BITS-1:0] operand;
    logic signed [FACTOR_BITS-1:0] factor;
    logic signed [PRODUCT_BITS-1:0] product;
    logic signed [TREE_BITS-1:0] tree;
    logic any_input, any_output;

    always_comb begin
        tree = '0;
        for (int l = 0; l < MULTIPLIERS; l++) begin
            x = '0;
            any_input = 1'b0;
            for (int k = 0; k < G_K; k++)
                if (DENSE_INPUTS[l*G_K+k]) begin
                    if (!any_input || lane_in[l*IN_BITS+:IN_BITS] == IN_BITS'(k))
                        x = word[k*ACTIVATION_BITS+:ACTIVATION_BITS];
                    any_input = 1'b1;
                end
            of_output = '0;
            any_output = 1'b0;
            for (int o = 0; o < G_O; o++)
                if (UNIFIED_OUTPUTS[l*G_O+o]) begin
                    if (!any_output || lane_out[l*OUT_BITS+:OUT_BITS] == OUT_BITS'(o))
                        of_output = sums[o*SUM_BITS+:SUM_BITS];
                    any_output = 1'b1;
                end
            operand = dense || !UNIFIED_PATH ? OPERAND_BITS'($signed(x)) : OPERAND_BITS'($signed(of_output));
            `MUTANT(45, if (dense) operand = OPERAND_BITS'($signed(word[ACTIVATION_BITS-1:0]));)
            factor = lane_factor[l*FACTOR_BITS+:FACTOR_BITS];
            product = factor * operand;
            products[l*PRODUCT_BITS+:PRODUCT_BITS] = product;
            tree = l % TREE == 0 ? TREE_BITS'(product) : tree + TREE_BITS'(product);
            if (l % TREE == TREE - 1) trees[l/TREE*TREE_BITS+:TREE_BITS] = tree;
        end
    end

    logic signed [WIDE-1:0] addend;
    logic [ACCUMULATOR_BITS-1:0] accumulator;
    logic any_accumulator;

    generate
        if (ONE_ADDER_PER_TREE) begin : g_shared
            always_comb begin
                updated = live;
                for (int t = 0; t < TREES; t++) begin
                    accumulator = '0;
                    any_accumulator = 1'b0;
                    for (int o = 0; o < G_O; o++)
                        if (DENSE_OUTPUTS[t*TREE*G_O+o]) begin
                            if (!any_accumulator || lane_out[t*TREE*OUT_BITS+:OUT_BITS] == OUT_BITS'(o))
                                accumulator = live[o*ACCUMULATOR_BITS+:ACCUMULATOR_BITS];
                            any_accumulator = 1'b1;
                        end
                    addend = WIDE'($signed(trees[t*TREE_BITS+:TREE_BITS]));
                    accumulator = accumulator + addend[ACCUMULATOR_BITS-1:0];
                    for (int o = 0; o < G_O; o++)
                        if (DENSE_OUTPUTS[t*TREE*G_O+o] && lane_valid[t*TREE]
                            && lane_out[t*TREE*OUT_BITS+:OUT_BITS] == OUT_BITS'(o))
                            updated[o*ACCUMULATOR_BITS+:ACCUMULATOR_BITS] = accumulator;
                end
            end
        end else begin : g_per_output
            always_comb begin
                any_accumulator = 1'b0;
                for (int o = 0; o < G_O; o++) begin
                    accumulator = live[o*ACCUMULATOR_BITS+:ACCUMULATOR_BITS];
                    addend = '0;
                    for (int l = 0; l < MULTIPLIERS; l++) begin
                        any_accumulator = lane_valid[l] && lane_out[l*OUT_BITS+:OUT_BITS] == OUT_BITS'(o);
                        if (UNIFIED_PATH && UNIFIED_OUTPUTS[l*G_O+o] && !dense && any_accumulator)
                            addend = WIDE'($signed(products[l*PRODUCT_BITS+:PRODUCT_BITS]));
                        if (l % TREE == 0 && DENSE_OUTPUTS[l*G_O+o] && (dense || !UNIFIED_PATH) && any_accumulator) begin
                            if (TREE == G_K || TREE == MULTIPLIERS) addend = WIDE'($signed(trees[l/TREE*TREE_BITS+:TREE_BITS]));
                            else addend = addend + WIDE'($signed(trees[l/TREE*TREE_BITS+:TREE_BITS]));
                        end
                    end
                    updated[o*ACCUMULATOR_BITS+:ACCUMULATOR_BITS] = accumulator + addend[ACCUMULATOR_BITS-1:0];
                end
                `MUTANT(47, for (int o = 0; o < G_O; o++)
                    updated[(o+1)*ACCUMULATOR_BITS-1] = updated[(o+1)*ACCUMULATOR_BITS-2];)
            end
        end
    endgenerate

    always_ff @(posedge clock) begin
        accumulators[live_set] <= updated;
        if (switch_set) accumulators[!live_set] <= '0;
        `MUTANT(44, if (switch_set) accumulators[!live_set] <= accumulators[!live_set];)
    end

    // What a lane that has no choice is told, and what sums wrap away at the accumulator's width.
    logic unused;
    always_comb unused = &{1'b0, first, dense, adder_valid, adder_negative, adder_out, adder_in, lane_in, lane_out, lane_valid,
        products, UNIFIED_OUTPUTS, DENSE_OUTPUTS, addend, sums};
endmodule
