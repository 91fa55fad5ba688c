// The skip front end of one row: looks at WINDOW type codes a cycle, pushes the first that is not PRUNED into its queue.
//
// Every decision follows from the state at the start of the cycle (docs/microarchitecture.md, section 3, rule 3).
`include "mutants.svh"

module front_end #(
    parameter int WINDOW = 4,
    parameter int QUEUE = 2,
    parameter int COLUMN_BITS = 20
) (
    input  logic                   clock,
    input  logic                   reset,
    // Start of a segment: block columns segment_begin … segment_end - 1.
    input  logic                   segment_load,
    input  logic [COLUMN_BITS-1:0] segment_begin,
    input  logic [COLUMN_BITS-1:0] segment_end,
    // Codes of block columns scan …, two bits each; those beyond the segment are ignored.
    output logic [COLUMN_BITS-1:0] scan,
    input  logic [   2*WINDOW-1:0] codes,
    input  logic                   pop,
    output logic                   queued,
    output logic [COLUMN_BITS-1:0] head_column,
    output logic                   head_dense,
    output logic                   finished,
    output logic                   finished_next,
    // Events of this cycle.
    output logic [COLUMN_BITS-1:0] examined,
    output logic [COLUMN_BITS-1:0] scanned
);
    localparam int COUNT_BITS = $clog2(QUEUE + 1);
    localparam int PLACE_BITS = QUEUE > 1 ? $clog2(QUEUE) : 1;
    localparam logic [COUNT_BITS-1:0] FULL = COUNT_BITS'(QUEUE);
    localparam logic [PLACE_BITS-1:0] LAST = PLACE_BITS'(QUEUE - 1);

    logic [COLUMN_BITS-1:0] stop;
    logic [COLUMN_BITS:0] queue[0:QUEUE-1];
    logic [PLACE_BITS-1:0] head, tail;
    logic [COUNT_BITS-1:0] count, count_next;
    logic [COLUMN_BITS-1:0] left, window, passed, scan_next;
    logic scanning, found, found_dense;

    always_comb begin
        left = stop - scan;
        window = left < COLUMN_BITS'(WINDOW) ? left : COLUMN_BITS'(WINDOW);
        `MUTANT(1, if (window > 1) window = window - 1'b1;)
        `MUTANT(2, window = COLUMN_BITS'(WINDOW);)
        scanning = scan != stop && count != FULL;
        `MUTANT(3, scanning = scan != stop && count < FULL - 1'b1;)
        `MUTANT(4, scanning = scan != stop && count <= FULL;)
        found = 1'b0;
        found_dense = 1'b0;
        passed = window;
        for (int d = WINDOW - 1; d >= 0; d--) begin
            if (COLUMN_BITS'(d) < window && codes[2*d+:2] != 2'd0) begin
                found = 1'b1;
                found_dense = codes[2*d+1];
                passed = COLUMN_BITS'(d + 1);
            end
        end
        examined = scanning ? window : '0;
        scanned = scanning ? passed : '0;
        `MUTANT(5, examined = scanned;)
        `MUTANT(6, if (scanning) scanned = window;)
        scan_next = scan + scanned;
        `MUTANT(7, found_dense = !found_dense;)
        queued = count != '0;
        {head_dense, head_column} = queue[head];
        finished = scan == stop && !queued;
    end

    always_comb begin
        count_next = count + COUNT_BITS'(scanning && found) - COUNT_BITS'(pop);
        finished_next = scan_next == stop && count_next == '0;
        `MUTANT(8, finished_next = scan_next == stop;)
    end

    always_ff @(posedge clock) begin
        if (scanning && found) queue[tail] <= {found_dense, scan + passed - 1'b1};
        if (reset) begin
            scan <= '0;
            stop <= '0;
            head <= '0;
            tail <= '0;
            count <= '0;
        end else begin
            scan <= segment_load ? segment_begin : scan_next;
            if (segment_load) stop <= segment_end;
            `MUTANT(9, if (segment_load && segment_end != '0) stop <= segment_end - 1'b1;)
            count <= count_next;
            if (pop) head <= head == LAST ? '0 : head + 1'b1;
            `MUTANT(10, if (pop && head == LAST) head <= head;)
            if (scanning && found) tail <= tail == LAST ? '0 : tail + 1'b1;
        end
    end
endmodule
