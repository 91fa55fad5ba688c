// The drain port: the live outputs of the pass that has ended, DRAIN_WORDS requantised results a cycle while drain_ready is high.
//
// Live outputs are the real channels of the row tile in the real columns of the column tile; they leave column by column, in each
// column row by row of the array, in each row by channel.
`include "mutants.svh"

module drain #(
    parameter int ROWS = 4,
    parameter int COLUMNS = 4,
    parameter int G_O = 4,
    parameter int DRAIN_WORDS = 4,
    parameter int ACCUMULATOR_BITS = 32,
    parameter int ACTIVATION_BITS = 8,
    parameter int CHANNEL_LANES = 1,
    parameter int MAX_CHANNELS = 256
) (
    input  logic                                        clock,
    input  logic                                        reset,
    // Layer.
    input  logic [31:0]                                 channels,
    input  logic [31:0]                                 m_blocks,
    input  logic                                        relu,
    input  logic [CHANNEL_LANES-1:0]                    channel_write,
    input  logic [31:0]                                 channel_index,
    input  logic [56*CHANNEL_LANES-1:0]                 channel_data,
    // The pass that has just ended.
    input  logic                                        start,
    input  logic [31:0]                                 group,
    input  logic [31:0]                                 live_rows,
    input  logic [31:0]                                 width,
    input  logic [31:0]                                 position,
    input  logic [ROWS*32-1:0]                          block_rows,
    input  logic [ROWS*COLUMNS*G_O*ACCUMULATOR_BITS-1:0] accumulators,
    output logic                                        done_next,
    // The port.
    input  logic                                        drain_ready,
    output logic [DRAIN_WORDS-1:0]                      drain_valid,
    output logic [DRAIN_WORDS*ACTIVATION_BITS-1:0]      drain_value,
    output logic [DRAIN_WORDS*32-1:0]                   drain_channel,
    output logic [DRAIN_WORDS*32-1:0]                   drain_position
);
    localparam int INDEX_BITS = MAX_CHANNELS > 1 ? $clog2(MAX_CHANNELS) : 1;

    logic [55:0] parameters[0:MAX_CHANNELS-1];
    logic active;
    logic [31:0] of_group, rows, columns, origin;
    logic [ROWS*32-1:0] blocks;
    logic [31:0] column, row, output_index;
    logic [31:0] column_next, row_next, output_next;
    logic [31:0] block, last_channels, channel;
    logic [DRAIN_WORDS*ACCUMULATOR_BITS-1:0] taken;
    logic [DRAIN_WORDS*56-1:0] used;

    always_comb begin
        last_channels = channels - (m_blocks - 32'd1) * 32'(G_O);
        `MUTANT(49, last_channels = 32'(G_O);)
        column_next = column;
        row_next = row;
        output_next = output_index;
        block = '0;
        channel = '0;
        for (int l = 0; l < DRAIN_WORDS; l++) begin
            drain_valid[l] = active && column_next < columns;
            block = blocks[32'(row_next)*32+:32];
            `MUTANT(50, block = row_next;)
            channel = of_group * channels + block * 32'(G_O) + output_next;
            drain_channel[l*32+:32] = channel;
            drain_position[l*32+:32] = origin + column_next;
            used[l*56+:56] = parameters[INDEX_BITS'(channel)];
            `MUTANT(51, used[l*56+:56] = parameters[INDEX_BITS'(channel - of_group * channels)];)
            taken[l*ACCUMULATOR_BITS+:ACCUMULATOR_BITS] = drain_valid[l]
                ? accumulators[((32'(row_next)*COLUMNS+32'(column_next))*G_O+32'(output_next))*ACCUMULATOR_BITS+:ACCUMULATOR_BITS]
                : '0;
            if (drain_valid[l]) begin
                output_next = output_next + 32'd1;
                if (output_next == (block == m_blocks - 32'd1 ? last_channels : 32'(G_O))) begin
                    output_next = '0;
                    row_next = row_next + 32'd1;
                    if (row_next == rows) begin
                        row_next = '0;
                        column_next = column_next + 32'd1;
                    end
                end
            end
        end
        done_next = !active || (drain_ready && column_next == columns);
        `MUTANT(52, done_next = !active;)
        `MUTANT(53, done_next = !active || column_next == columns;)
    end

    generate
        for (genvar l = 0; l < DRAIN_WORDS; l++) begin : g_lane
            requantizer #(.ACCUMULATOR_BITS(ACCUMULATOR_BITS), .ACTIVATION_BITS(ACTIVATION_BITS)) requantize (
                .accumulator(taken[l*ACCUMULATOR_BITS+:ACCUMULATOR_BITS]), .bias(used[l*56+:32]),
                .scale(used[l*56+32+:16]), .shift(used[l*56+48+:8]), .relu,
                .result(drain_value[l*ACTIVATION_BITS+:ACTIVATION_BITS]));
        end
    endgenerate

    always_ff @(posedge clock) begin
        for (int l = 0; l < CHANNEL_LANES; l++)
            if (channel_write[l]) parameters[INDEX_BITS'(channel_index + 32'(l))] <= channel_data[56*l+:56];
        if (reset) active <= 1'b0;
        else if (start) begin
            active <= 1'b1;
            of_group <= group;
            rows <= live_rows;
            columns <= width;
            `MUTANT(54, columns <= 32'(COLUMNS);)
            origin <= position;
            blocks <= block_rows;
            column <= '0;
            row <= '0;
            output_index <= '0;
        end else if (active && drain_ready) begin
            active <= !done_next;
            column <= column_next;
            row <= row_next;
            output_index <= output_next;
        end
        `MUTANT(55, if (active && !start) begin
            column <= column_next;
            row <= row_next;
            output_index <= output_next;
        end)
    end
endmodule
