// Takes a memory image (docs/formats.md, "The memory image") apart as it comes from DRAM, up to LANES bytes a cycle: parts of the
// streams into the rows' memories, where they begin there into the rows' directories, channel parameters to the drain.
//
// A transfer is a run of consecutive block rows of one part of the image. Position q of a group's execution order goes to row
// q mod ROWS as row tile q div ROWS; a row's memory is filled in the order in which the parts come, from the start of the half
// that is loaded. Offsets come before the streams: they say where a block row's part ends and the next begins. Block rows without a
// byte in a stream are left out of its list of parts, so that every byte is at most one part further than the one before.
`include "mutants.svh"

module loader #(
    parameter int ROWS = 4,
    parameter int LANES = 4,
    parameter int CHANNEL_LANES = 1,
    parameter int TILE_BITS = 4,
    parameter int MAX_CHANNELS = 256,
    parameter int TYPE_BYTES = 64,
    parameter int SIGN_BYTES = 64,
    parameter int MAGNITUDE_BYTES = 64,
    parameter int DENSE_BYTES = 64
) (
    input  logic                 clock,
    input  logic                 reset,
    // Layer.
    input  logic [31:0]          m_blocks,
    input  logic [3:0]           streams,
    input  logic                 sorted,
    // A phase of the channel begins; its weights go to this half.
    input  logic                 phase_start,
    input  logic                 phase_half,
    // The transfer: its part (0 row order, 1 offsets, 2 channel parameters, 3 … 6 streams); its first block row (of channel
    // parameters the first channel), that row's place in its group and its row tile; block rows; the address in DRAM.
    input  logic                 active,
    input  logic [2:0]           part,
    input  logic [31:0]          first,
    input  logic [31:0]          first_place,
    input  logic [TILE_BITS-1:0] first_tile,
    input  logic [31:0]          count,
    input  logic [31:0]          address,
    input  logic                 last,
    input  logic [7:0]           load_count,
    input  logic [8*LANES-1:0]   load_data,
    // The rows.
    output logic [4*ROWS*LANES-1:0] write,
    output logic [32*LANES-1:0]  write_byte,
    output logic [8*LANES-1:0]   write_data,
    output logic [ROWS*LANES-1:0] directory_write,
    output logic [2:0]           directory_field,
    output logic [LANES*(TILE_BITS+1)-1:0] directory_tile,
    output logic [32*LANES-1:0]  directory_value,
    output logic [CHANNEL_LANES-1:0] channel_write,
    output logic [31:0]          channel_index,
    output logic [56*CHANNEL_LANES-1:0] channel_data
);
    localparam logic [2:0] ORDER = 3'd0, OFFSETS = 3'd1, CHANNELS = 3'd2;
    localparam int ROW_BITS = ROWS > 1 ? $clog2(ROWS) : 1;
    localparam int PLACE_BITS = TILE_BITS + ROW_BITS;
    localparam int INDEX_BITS = $clog2(MAX_CHANNELS + 1);
    localparam int PARTS = 1 << INDEX_BITS;

    // Where a block row goes, with a stored order; of each stream the parts with bytes, in order: where they begin and go; and
    // which of them is the first of a block row or of one behind it.
    logic [PLACE_BITS-1:0] place_of[0:PARTS-1];
    logic [31:0] starts[0:4*PARTS-1];
    logic [PLACE_BITS-1:0] goes_to[0:4*PARTS-1];
    logic [INDEX_BITS-1:0] part_of[0:4*PARTS-1];

    // State within a transfer, and as it is after each byte of this cycle.
    logic half, begun, begun_now, part_begins, on;
    logic [2:0] part_before;
    logic [2:0] byte_count, byte_count_now;
    logic [47:0] bytes, bytes_now;
    logic [31:0] block_row, block_row_now, place, place_now, at, at_now, word, channel_held, channel_now;
    logic [TILE_BITS-1:0] tile, tile_now;
    logic [ROW_BITS-1:0] row, row_now;
    logic [1:0] stream, stream_now, of;
    logic [INDEX_BITS-1:0] entry, entry_now, entry_last;
    logic [4*INDEX_BITS-1:0] tails, tails_now;
    logic [127:0] previous, previous_now;
    logic [ROWS*32-1:0] used, used_now;
    logic [31:0] half_bytes;
    logic [PLACE_BITS-1:0] goes;
    int completed;
    // What the tables are written with.
    logic [LANES-1:0] place_write, entry_write;
    logic [LANES*INDEX_BITS-1:0] table_row, table_entry;
    logic [LANES*PLACE_BITS-1:0] table_place;
    logic [LANES*2-1:0] table_stream;
    logic [LANES*32-1:0] table_start;

    function automatic logic [1:0] lowest(input logic [2:0] present);
        lowest = present[0] ? 2'd0 : present[1] ? 2'd1 : present[2] ? 2'd2 : 2'd3;
    endfunction

    always_comb begin
        write = '0;
        write_byte = '0;
        write_data = load_data;
        directory_write = '0;
        directory_field = part < 3'd3 ? 3'd4 : part - 3'd3;
        directory_tile = '0;
        directory_value = '0;
        channel_write = '0;
        channel_data = '0;
        place_write = '0;
        entry_write = '0;
        table_row = '0;
        table_entry = '0;
        table_place = '0;
        table_stream = '0;
        table_start = '0;
        of = 2'(part - 3'd3);
        half_bytes = of == 2'd0 ? 32'(TYPE_BYTES / 2) : of == 2'd1 ? 32'(SIGN_BYTES / 2)
            : of == 2'd2 ? 32'(MAGNITUDE_BYTES / 2) : 32'(DENSE_BYTES / 2);
        begun_now = begun;
        byte_count_now = begun ? byte_count : '0;
        bytes_now = bytes;
        block_row_now = begun ? block_row : first;
        place_now = begun ? place : first_place;
        tile_now = begun ? tile : first_tile;
        row_now = begun ? row : '0;
        stream_now = begun ? stream : lowest(streams[2:0]);
        at_now = begun ? at : address;
        entry_now = begun ? entry : part_of[{of, INDEX_BITS'(first)}];
        entry_last = part_of[{of, INDEX_BITS'(first + count - 32'd1)}];
        channel_now = begun ? channel_held : first;
        channel_index = channel_now;
        `MUTANT(96, channel_index = channel_now ^ 32'd1;)
        tails_now = tails;
        previous_now = previous;
        used_now = used;
        if (!begun && part != part_before) used_now = {ROWS{half ? half_bytes : 32'd0}};
        `MUTANT(92, if (!begun && part != part_before) used_now = '0;)
        if (!begun && part == OFFSETS)
            // A new run: what the list ended with stays.
            for (int s = 0; s < 4; s++)
                tails_now[s*INDEX_BITS+:INDEX_BITS] = tails_now[s*INDEX_BITS+:INDEX_BITS] + 1'b1;
        completed = 0;
        word = '0;
        goes = '0;
        part_begins = 1'b0;
        on = 1'b0;
        if (active && load_count != '0)
            for (int l = 0; l < LANES; l++) begin
                on = 8'(l) < load_count;
                directory_tile[l*(TILE_BITS+1)+:TILE_BITS+1] = {half, tile_now};
                if (on && part > CHANNELS) begin
                    part_begins = !begun_now;
                    if (begun_now && entry_now != entry_last && at_now >= starts[{of, entry_now + 1'b1}]) begin
                        part_begins = 1'b1;
                        entry_now = entry_now + 1'b1;
                    end
                    {tile_now, row_now} = goes_to[{of, entry_now}];
                    write[32'({row_now, of})*LANES+l] = 1'b1;
                    `MUTANT(94, if (!begun_now) write[32'({row_now, of})*LANES+l] = 1'b0;)
                    `MUTANT(95, if (l == LANES - 1) write[32'({row_now, of})*LANES+l] = 1'b0;)
                    write_byte[l*32+:32] = used_now[32'(row_now)*32+:32];
                    directory_write[32'(row_now)*LANES+l] = part_begins;
                    directory_tile[l*(TILE_BITS+1)+:TILE_BITS+1] = {half, tile_now};
                    directory_value[l*32+:32] = used_now[32'(row_now)*32+:32];
                    `MUTANT(93, directory_value[l*32+:32] = used_now[32'(row_now)*32+:32] + 32'd1;)
                    used_now[32'(row_now)*32+:32] = used_now[32'(row_now)*32+:32] + 32'd1;
                    at_now = at_now + 32'd1;
                end
                if (on && part == CHANNELS) begin
                    byte_count_now = byte_count_now + 3'd1;
                    if (byte_count_now == 3'd7) begin
                        byte_count_now = '0;
                        channel_write[completed] = 1'b1;
                        channel_data[completed*56+:56] = {load_data[8*l+:8], bytes_now};
                        completed = completed + 1;
                        channel_now = channel_now + 32'd1;
                    end
                end
                if (on && part == ORDER) begin
                    byte_count_now = byte_count_now ^ 3'd1;
                    if (byte_count_now == '0) begin
                        word = 32'({load_data[8*l+:8], bytes_now[47:40]});
                        `MUTANT(90, word = place_now;)
                        place_write[l] = 1'b1;
                        table_row[l*INDEX_BITS+:INDEX_BITS] = INDEX_BITS'(block_row_now - place_now + word);
                        table_place[l*PLACE_BITS+:PLACE_BITS] = {tile_now, row_now};
                        directory_write[32'(row_now)*LANES+l] = 1'b1;
                        directory_value[l*32+:32] = word;
                    end
                end
                if (on && part == OFFSETS) begin
                    byte_count_now = {1'b0, byte_count_now[1:0] + 2'd1};
                    if (byte_count_now == '0) begin
                        word = {load_data[8*l+:8], bytes_now[47:24]};
                        goes = sorted ? place_of[INDEX_BITS'(block_row_now)] : {tile_now, row_now};
                        `MUTANT(91, goes = {tile_now, row_now};)
                        // The part before this one has no byte: it leaves the list.
                        if (block_row_now != first && word != previous_now[32*stream_now+:32])
                            tails_now[stream_now*INDEX_BITS+:INDEX_BITS] =
                                tails_now[stream_now*INDEX_BITS+:INDEX_BITS] + 1'b1;
                        previous_now[32*stream_now+:32] = word;
                        entry_write[l] = 1'b1;
                        table_row[l*INDEX_BITS+:INDEX_BITS] = INDEX_BITS'(block_row_now);
                        table_stream[l*2+:2] = stream_now;
                        table_entry[l*INDEX_BITS+:INDEX_BITS] = tails_now[stream_now*INDEX_BITS+:INDEX_BITS];
                        table_place[l*PLACE_BITS+:PLACE_BITS] = goes;
                        table_start[l*32+:32] = word;
                        directory_write[32'(row_now)*LANES+l] = !sorted;
                        directory_value[l*32+:32] = place_now;
                    end
                end
                // The next block row in order, where one record has ended.
                if (on && part < CHANNELS && byte_count_now == '0) begin
                    if (part == OFFSETS && (streams & (4'b1110 << stream_now)) != '0)
                        stream_now = lowest(streams[2:0] & (3'b110 << stream_now));
                    else begin
                        stream_now = lowest(streams[2:0]);
                        block_row_now = block_row_now + 32'd1;
                        place_now = place_now + 32'd1;
                        row_now = row_now + 1'b1;
                        if (row_now == ROW_BITS'(ROWS) || place_now == m_blocks) begin
                            row_now = '0;
                            tile_now = tile_now + 1'b1;
                        end
                        if (place_now == m_blocks) place_now = '0;
                    end
                end
                if (on) begin
                    bytes_now = {load_data[8*l+:8], bytes_now[47:8]};
                    begun_now = 1'b1;
                end
            end
    end

    always_ff @(posedge clock) begin
        if (active && load_count != '0) begin
            byte_count <= byte_count_now;
            bytes <= bytes_now;
            block_row <= block_row_now;
            place <= place_now;
            tile <= tile_now;
            row <= row_now;
            stream <= stream_now;
            at <= at_now;
            entry <= entry_now;
            channel_held <= channel_now;
            tails <= tails_now;
            previous <= previous_now;
            used <= used_now;
            part_before <= part;
            for (int l = 0; l < LANES; l++) begin
                if (place_write[l]) place_of[table_row[l*INDEX_BITS+:INDEX_BITS]] <= table_place[l*PLACE_BITS+:PLACE_BITS];
                if (entry_write[l]) begin
                    starts[{table_stream[l*2+:2], table_entry[l*INDEX_BITS+:INDEX_BITS]}] <= table_start[l*32+:32];
                    goes_to[{table_stream[l*2+:2], table_entry[l*INDEX_BITS+:INDEX_BITS]}]
                        <= table_place[l*PLACE_BITS+:PLACE_BITS];
                    part_of[{table_stream[l*2+:2], table_row[l*INDEX_BITS+:INDEX_BITS]}]
                        <= table_entry[l*INDEX_BITS+:INDEX_BITS];
                end
            end
        end
        begun <= begun_now && !last;
        if (phase_start) begin
            half <= phase_half;
            part_before <= 3'd7;
            tails <= '0;
        end
        if (reset) begun <= 1'b0;
    end
endmodule
