// A weight memory of one row: written in up to LANES bytes a cycle, read as WIDTH bits from any bit on, in the same cycle.
//
// Two neighbouring words are read and shifted: in silicon the even and the odd words are two banks.
`include "mutants.svh"

module bit_memory #(
    parameter int BYTES = 64,
    parameter int WIDTH = 16,
    parameter int LANES = 1,
    parameter int ADDRESS_BITS = 32
) (
    input  logic                    clock,
    input  logic [       LANES-1:0] write,
    input  logic [LANES*ADDRESS_BITS-1:0] write_byte,
    input  logic [     8*LANES-1:0] write_data,
    input  logic [ADDRESS_BITS-1:0] read_bit,
    output logic [       WIDTH-1:0] read_data
);
    localparam int LOG_WORD = WIDTH <= 8 ? 3 : $clog2(WIDTH);
    localparam int WORD = 1 << LOG_WORD;
    localparam int DEPTH = (8 * BYTES + WORD - 1) / WORD + 2;
    localparam int INDEX_BITS = $clog2(DEPTH);

    logic [WORD-1:0] words[0:DEPTH-1];
    logic [INDEX_BITS-1:0] low, high;
    logic [2*WORD-1:0] pair;

    always_comb begin
        low = INDEX_BITS'(read_bit >> LOG_WORD);
        high = low + 1'b1;
        `MUTANT(42, high = low;)
        pair = {words[high], words[low]};
        read_data = WIDTH'(pair >> read_bit[LOG_WORD-1:0]);
    end

    generate
        if (LOG_WORD == 3) begin : g_byte
            always_ff @(posedge clock)
                for (int l = 0; l < LANES; l++)
                    if (write[l]) words[INDEX_BITS'(write_byte[l*ADDRESS_BITS+:ADDRESS_BITS])] <= write_data[8*l+:8];
        end else begin : g_wide
            always_ff @(posedge clock)
                for (int l = 0; l < LANES; l++)
                    if (write[l])
                        words[INDEX_BITS'(write_byte[l*ADDRESS_BITS+:ADDRESS_BITS] >> (LOG_WORD - 3))]
                            [8*write_byte[l*ADDRESS_BITS+:LOG_WORD-3]+:8] <= write_data[8*l+:8];
        end
    endgenerate
endmodule
