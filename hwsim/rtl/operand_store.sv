// The operand store: BANKS banks, two halves; one half is read by the arbiter's grants while the fill port writes the other.
//
// Block column j lies in bank j mod BANKS, there at place (j div BANKS) mod DEPTH: the columns of a segment are consecutive, so
// no two of a bank share a place. The fill port writes FILL_WORDS words of consecutive block columns in a cycle.
module operand_store #(
    parameter int BANKS = 4,
    parameter int SEGMENT_WORDS = 16,
    parameter int FILL_WORDS = 1,
    parameter int WORD_BITS = 64,
    parameter int COLUMN_BITS = 20
) (
    input  logic                            clock,
    input  logic                            half,
    input  logic [BANKS*COLUMN_BITS-1:0]    bank_column,
    output logic [BANKS*WORD_BITS-1:0]      bank_word,
    input  logic [FILL_WORDS-1:0]           fill,
    input  logic [COLUMN_BITS-1:0]          fill_column,
    input  logic [FILL_WORDS*WORD_BITS-1:0] fill_data
);
    localparam int DEPTH = (SEGMENT_WORDS + BANKS - 1) / BANKS;
    localparam int HALF = BANKS * DEPTH;
    localparam int INDEX_BITS = $clog2(2 * HALF);

    logic [WORD_BITS-1:0] words[0:2*HALF-1];

    function automatic logic [INDEX_BITS-1:0] place(input logic of_half, input logic [COLUMN_BITS-1:0] column);
        logic [31:0] bank, row;
        bank = 32'(column) % 32'(BANKS);
        row = (32'(column) / 32'(BANKS)) % 32'(DEPTH);
        place = INDEX_BITS'((of_half ? 32'(HALF) : 32'd0) + bank * 32'(DEPTH) + row);
    endfunction

    always_comb
        for (int a = 0; a < BANKS; a++)
            bank_word[a*WORD_BITS+:WORD_BITS] = words[place(half, bank_column[a*COLUMN_BITS+:COLUMN_BITS])];

    always_ff @(posedge clock)
        for (int f = 0; f < FILL_WORDS; f++)
            if (fill[f]) words[place(!half, fill_column + COLUMN_BITS'(f))] <= fill_data[f*WORD_BITS+:WORD_BITS];
endmodule
