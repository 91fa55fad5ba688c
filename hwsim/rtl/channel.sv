// The DRAM channel: carries the transfers of a phase one after the other, in the order of the program, with no cycle between them.
//
// A phase has weight transfers, then input transfers, then at most one store, which waits until store_ready. The program port shows
// the next transfer of the layer; the DRAM outside says with which cycle a transfer ends.
`include "mutants.svh"

module channel (
    input  logic        clock,
    input  logic        reset,
    // A phase, and the number of its transfers.
    input  logic        phase_start,
    input  logic [31:0] phase_weights,
    input  logic [31:0] phase_inputs,
    input  logic        phase_store,
    input  logic        store_ready,
    output logic        phase_done_next,
    output logic        inputs_arrived,
    // The DRAM.
    output logic        request,
    output logic        carries_weights,
    output logic        carries_outputs,
    input  logic        transfer_last
);
    logic [31:0] weights, inputs, weights_next, inputs_next;
    logic store, store_next, ends;

    always_comb begin
        carries_weights = weights != '0;
        carries_outputs = weights == '0 && inputs == '0;
        request = carries_weights || inputs != '0 || (store && store_ready);
        ends = request && transfer_last;
        weights_next = ends && carries_weights ? weights - 32'd1 : weights;
        inputs_next = ends && !carries_weights && inputs != '0 ? inputs - 32'd1 : inputs;
        store_next = store && !(ends && carries_outputs);
        `MUTANT(89, store_next = store && !ends;)
        phase_done_next = weights_next == '0 && inputs_next == '0 && !store_next;
        `MUTANT(87, phase_done_next = weights_next == '0 && !store_next;)
        inputs_arrived = inputs == '0;
        `MUTANT(88, inputs_arrived = inputs_next == '0;)
    end

    always_ff @(posedge clock) begin
        weights <= weights_next;
        inputs <= inputs_next;
        store <= store_next;
        if (phase_start) begin
            weights <= phase_weights;
            inputs <= phase_inputs;
            store <= phase_store;
        end
        if (reset) begin
            weights <= '0;
            inputs <= '0;
            store <= 1'b0;
        end
    end
endmodule
