// A weight memory of one row: written a byte at a time, read as WIDTH bits from any bit on.
//
// Two neighbouring words are read and shifted: in silicon the even and the odd words are two banks.
module bit_memory #(
    parameter int BYTES = 64,
    parameter int WIDTH = 16,
    parameter int ADDRESS_BITS = 32
) (
    input  logic                    clock,
    input  logic                    write,
    input  logic [ADDRESS_BITS-1:0] write_byte,
    input  logic [             7:0] write_data,
    input  logic [ADDRESS_BITS-1:0] read_bit,
    output logic [       WIDTH-1:0] read_data
);
    localparam int LOG_WORD = WIDTH <= 8 ? 3 : $clog2(WIDTH);
    localparam int WORD = 1 << LOG_WORD;
    localparam int DEPTH = (8 * BYTES + WORD - 1) / WORD + 2;
    localparam int INDEX_BITS = $clog2(DEPTH);

    logic [WORD-1:0] words[0:DEPTH-1];
    logic [INDEX_BITS-1:0] low, high, written;
    logic [2*WORD-1:0] pair;

    always_comb begin
        low = INDEX_BITS'(read_bit >> LOG_WORD);
        high = low + 1'b1;
        pair = {words[high], words[low]};
        read_data = WIDTH'(pair >> read_bit[LOG_WORD-1:0]);
        written = INDEX_BITS'(write_byte >> (LOG_WORD - 3));
    end

    generate
        if (LOG_WORD == 3) begin : g_byte
            always_ff @(posedge clock) if (write) words[written] <= write_data;
        end else begin : g_wide
            always_ff @(posedge clock)
                if (write) words[written][8*write_byte[LOG_WORD-4:0]+:8] <= write_data;
        end
    endgenerate
endmodule
