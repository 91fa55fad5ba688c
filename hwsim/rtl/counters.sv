// The event counters of a segment (docs/microarchitecture.md, section 3, "Counters"), in the order of hwsim.oracle.COUNTERS.
//
// They count while the segment's rows work and stand still while it waits for a fill or a drain. The segment that has ended is
// held in `report` for the host, counter 0 lowest.
`include "mutants.svh"

module counters #(
    parameter int ROWS = 4,
    parameter int BANKS = 4,
    parameter int COLUMN_BITS = 20,
    parameter int COUNTER_BITS = 32
) (
    input  logic                        clock,
    input  logic                        reset,
    input  logic                        counting,
    input  logic                        segment_done,
    input  logic [BANKS-1:0]            bank_read,
    input  logic [ROWS-1:0]             grant,
    input  logic [ROWS*COLUMN_BITS-1:0] scanned,
    input  logic [ROWS*COLUMN_BITS-1:0] examined,
    input  logic [ROWS-1:0]             unified,
    input  logic [ROWS-1:0]             dense,
    input  logic [ROWS*6-1:0]           row_class,
    output logic                        report_valid,
    output logic [13*COUNTER_BITS-1:0]  report
);
    logic [13*COUNTER_BITS-1:0] count, events, sum;

    always_comb begin
        events = '0;
        events[0+:COUNTER_BITS] = COUNTER_BITS'(1);
        for (int a = 0; a < BANKS; a++)
            events[COUNTER_BITS+:COUNTER_BITS] = events[COUNTER_BITS+:COUNTER_BITS] + COUNTER_BITS'(bank_read[a]);
        for (int r = 0; r < ROWS; r++) begin
            events[2*COUNTER_BITS+:COUNTER_BITS] = events[2*COUNTER_BITS+:COUNTER_BITS] + COUNTER_BITS'(grant[r]);
            events[3*COUNTER_BITS+:COUNTER_BITS] = events[3*COUNTER_BITS+:COUNTER_BITS]
                + COUNTER_BITS'(scanned[r*COLUMN_BITS+:COLUMN_BITS]);
            events[4*COUNTER_BITS+:COUNTER_BITS] = events[4*COUNTER_BITS+:COUNTER_BITS]
                + COUNTER_BITS'(examined[r*COLUMN_BITS+:COLUMN_BITS]);
            events[5*COUNTER_BITS+:COUNTER_BITS] = events[5*COUNTER_BITS+:COUNTER_BITS] + COUNTER_BITS'(unified[r]);
            events[6*COUNTER_BITS+:COUNTER_BITS] = events[6*COUNTER_BITS+:COUNTER_BITS] + COUNTER_BITS'(dense[r]);
            for (int k = 0; k < 6; k++)
                events[(7+k)*COUNTER_BITS+:COUNTER_BITS] = events[(7+k)*COUNTER_BITS+:COUNTER_BITS]
                    + COUNTER_BITS'(row_class[6*r+k]);
        end
        for (int i = 0; i < 13; i++)
            sum[i*COUNTER_BITS+:COUNTER_BITS] = count[i*COUNTER_BITS+:COUNTER_BITS]
                + (counting ? events[i*COUNTER_BITS+:COUNTER_BITS] : '0);
        `MUTANT(64, sum[0+:COUNTER_BITS] = count[0+:COUNTER_BITS] + 1'b1;)
        `MUTANT(65, if (counting) sum[COUNTER_BITS+:COUNTER_BITS] =
            count[COUNTER_BITS+:COUNTER_BITS] + events[2*COUNTER_BITS+:COUNTER_BITS];)
    end

    always_ff @(posedge clock) begin
        count <= reset || segment_done ? '0 : sum;
        `MUTANT(67, if (segment_done) count <= events;)
        report_valid <= segment_done && !reset;
        if (segment_done) report <= sum;
        `MUTANT(66, if (segment_done) report <= count;)
    end
endmodule
