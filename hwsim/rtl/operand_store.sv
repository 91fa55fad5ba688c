// The operand store: BANKS banks, two halves; one half is read by the arbiter's grants while the fill port writes the other.
//
// Block column j lies in bank j mod BANKS, there in the order of the columns of its segment. The fill port writes FILL_WORDS words
// of consecutive block columns in a cycle. With a power of two of banks the divisions are wires.
`include "mutants.svh"

module operand_store #(
    parameter int BANKS = 4,
    parameter int SEGMENT_WORDS = 16,
    parameter int FILL_WORDS = 1,
    parameter int WORD_BITS = 64,
    parameter int COLUMN_BITS = 20
) (
    input  logic                            clock,
    input  logic                            half,
    // The first block column of the segment that is filled; with segment_load it is the one that is read from now on.
    input  logic                            segment_load,
    input  logic [COLUMN_BITS-1:0]          segment_begin,
    input  logic [BANKS*COLUMN_BITS-1:0]    bank_column,
    output logic [BANKS*WORD_BITS-1:0]      bank_word,
    input  logic [FILL_WORDS-1:0]           fill,
    input  logic [COLUMN_BITS-1:0]          fill_column,
    input  logic [FILL_WORDS*WORD_BITS-1:0] fill_data
);
    // A segment that does not begin in bank 0 reaches one place further.
    localparam int DEPTH = (SEGMENT_WORDS + BANKS - 1) / BANKS + (SEGMENT_WORDS % BANKS == 0 ? 0 : 1);
    localparam int HALF = BANKS * DEPTH;
    localparam int INDEX_BITS = $clog2(2 * HALF);

    logic [WORD_BITS-1:0] words[0:2*HALF-1];

    logic [COLUMN_BITS-1:0] read_begin;

    function automatic logic [INDEX_BITS-1:0] place(
        input logic of_half, input logic [COLUMN_BITS-1:0] begins, input int bank, input logic [COLUMN_BITS-1:0] column);
        place = INDEX_BITS'((of_half ? 32'(HALF) : 32'd0) + 32'(bank) * 32'(DEPTH)
            + 32'(column) / 32'(BANKS) - 32'(begins) / 32'(BANKS));
    endfunction

    always_comb
        for (int a = 0; a < BANKS; a++)
            bank_word[a*WORD_BITS+:WORD_BITS] = words[place(half, read_begin, a, bank_column[a*COLUMN_BITS+:COLUMN_BITS])];

    logic [FILL_WORDS*COLUMN_BITS-1:0] fill_bank;
    always_comb
        for (int f = 0; f < FILL_WORDS; f++)
            fill_bank[f*COLUMN_BITS+:COLUMN_BITS] = (fill_column + COLUMN_BITS'(f)) % COLUMN_BITS'(BANKS);

    always_ff @(posedge clock) begin
        if (segment_load) read_begin <= segment_begin;
        for (int f = 0; f < FILL_WORDS; f++)
            if (fill[f])
                words[place(!half, segment_begin, 32'(fill_bank[f*COLUMN_BITS+:COLUMN_BITS]), fill_column + COLUMN_BITS'(f))]
                    <= fill_data[f*WORD_BITS+:WORD_BITS];
        `MUTANT(68, for (int f = 0; f < FILL_WORDS; f++)
            if (fill[f])
                words[place(half, segment_begin, 32'(fill_bank[f*COLUMN_BITS+:COLUMN_BITS]), fill_column + COLUMN_BITS'(f))]
                    <= fill_data[f*WORD_BITS+:WORD_BITS];)
    end
endmodule
