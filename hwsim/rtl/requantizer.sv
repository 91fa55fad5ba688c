// y = clamp(floor(((acc + bias) · scale + r) / 2^shift)) to ACTIVATION_BITS, r = 2^(shift-1) or 0; with relu no less than 0.
`include "mutants.svh"

module requantizer #(
    parameter int ACCUMULATOR_BITS = 32,
    parameter int ACTIVATION_BITS = 8
) (
    input  logic [ACCUMULATOR_BITS-1:0] accumulator,
    input  logic [31:0]                 bias,
    input  logic [15:0]                 scale,
    input  logic [7:0]                  shift,
    input  logic                        relu,
    output logic [ACTIVATION_BITS-1:0]  result
);
    localparam int SUM_BITS = (ACCUMULATOR_BITS > 32 ? ACCUMULATOR_BITS : 32) + 1;
    localparam int WIDE = SUM_BITS + 17;
    localparam logic signed [WIDE-1:0] HIGH = (WIDE'(1) << (ACTIVATION_BITS - 1)) - WIDE'(1);
    localparam logic signed [WIDE-1:0] LOW = -(WIDE'(1) << (ACTIVATION_BITS - 1));

    logic signed [SUM_BITS-1:0] sum;
    logic signed [WIDE-1:0] product, rounding, value;

    always_comb begin
        sum = SUM_BITS'($signed(accumulator)) + SUM_BITS'($signed(bias));
        product = WIDE'(sum) * WIDE'($signed(scale));
        `MUTANT(58, product = WIDE'(sum) * $signed(WIDE'(scale));)
        `MUTANT(59, product = WIDE'($signed(accumulator)) * WIDE'($signed(scale)) + WIDE'($signed(bias));)
        rounding = shift == 8'd0 ? '0 : WIDE'(1) << (shift - 8'd1);
        `MUTANT(56, rounding = '0;)
        `MUTANT(57, if (shift != 8'd0) rounding = rounding - 1;)
        // From 2^WIDE on every quotient rounds to 0.
        if (32'(shift) >= WIDE - 1) value = '0;
        else value = (product + rounding) >>> shift;
        `MUTANT(60, if (32'(shift) < WIDE - 1) value = (product + rounding) >> shift;)
        if (value > HIGH) value = HIGH;
        if (value < LOW) value = LOW;
        `MUTANT(61, if (value == LOW) value = -HIGH;)
        `MUTANT(62, if (value < 0) value = '0;)
        if (relu && value < 0) value = '0;
        `MUTANT(63, if (value > HIGH - 1) value = HIGH - 1;)
        result = value[ACTIVATION_BITS-1:0];
    end
endmodule
