// The operand store's arbiter: each bank grants the smallest block column requested of it, to every row that asks for it.
`include "mutants.svh"

module arbiter #(
    parameter int ROWS = 4,
    parameter int BANKS = 4,
    parameter int COLUMN_BITS = 20,
    parameter int BANK_BITS = 2
) (
    input  logic [             ROWS-1:0] request,
    input  logic [ROWS*COLUMN_BITS-1:0]  column,
    output logic [             ROWS-1:0] grant,
    output logic [ROWS*BANK_BITS-1:0]    bank,
    output logic [            BANKS-1:0] bank_read,
    output logic [BANKS*COLUMN_BITS-1:0] bank_column
);
    logic [ROWS*COLUMN_BITS-1:0] least;

    always_comb begin
        for (int r = 0; r < ROWS; r++)
            bank[r*BANK_BITS+:BANK_BITS] =
                BANK_BITS'(column[r*COLUMN_BITS+:COLUMN_BITS] % COLUMN_BITS'(BANKS));
        `MUTANT(15, for (int r = 0; r < ROWS; r++)
            bank[r*BANK_BITS+:BANK_BITS] = BANK_BITS'((column[r*COLUMN_BITS+:COLUMN_BITS] >> 1) % COLUMN_BITS'(BANKS));)
        for (int a = 0; a < BANKS; a++) begin
            bank_read[a] = 1'b0;
            for (int r = 0; r < ROWS; r++) begin
                least[r*COLUMN_BITS+:COLUMN_BITS] = '1;
                if (request[r] && bank[r*BANK_BITS+:BANK_BITS] == BANK_BITS'(a)) begin
                    bank_read[a] = 1'b1;
                    least[r*COLUMN_BITS+:COLUMN_BITS] = column[r*COLUMN_BITS+:COLUMN_BITS];
                end
            end
            // A tree, so that the path grows with log2 ROWS.
            for (int step = 1; step < ROWS; step = 2 * step)
                for (int r = 0; r + step < ROWS; r = r + 2 * step)
                    if (least[(r+step)*COLUMN_BITS+:COLUMN_BITS] < least[r*COLUMN_BITS+:COLUMN_BITS])
                        least[r*COLUMN_BITS+:COLUMN_BITS] = least[(r+step)*COLUMN_BITS+:COLUMN_BITS];
            `MUTANT(11, for (int r = 0; r < ROWS; r++)
                if (request[r] && bank[r*BANK_BITS+:BANK_BITS] == BANK_BITS'(a)
                    && (column[r*COLUMN_BITS+:COLUMN_BITS] > least[0+:COLUMN_BITS]))
                    least[0+:COLUMN_BITS] = column[r*COLUMN_BITS+:COLUMN_BITS];)
            `MUTANT(12, for (int r = ROWS - 1; r >= 0; r--)
                if (request[r] && bank[r*BANK_BITS+:BANK_BITS] == BANK_BITS'(a))
                    least[0+:COLUMN_BITS] = column[r*COLUMN_BITS+:COLUMN_BITS];)
            bank_column[a*COLUMN_BITS+:COLUMN_BITS] = least[0+:COLUMN_BITS];
        end
        for (int r = 0; r < ROWS; r++)
            grant[r] = request[r] && column[r*COLUMN_BITS+:COLUMN_BITS] ==
                bank_column[32'(bank[r*BANK_BITS+:BANK_BITS])*COLUMN_BITS+:COLUMN_BITS];
        `MUTANT(13, for (int r = 1; r < ROWS; r++)
            for (int q = 0; q < r; q++)
                if (grant[q] && column[q*COLUMN_BITS+:COLUMN_BITS] == column[r*COLUMN_BITS+:COLUMN_BITS]) grant[r] = 1'b0;)
        `MUTANT(14, for (int q = 0; q < ROWS - 1; q++)
            if (grant[q] && column[q*COLUMN_BITS+:COLUMN_BITS] == column[(ROWS-1)*COLUMN_BITS+:COLUMN_BITS])
                grant[ROWS-1] = 1'b0;)
    end
endmodule
