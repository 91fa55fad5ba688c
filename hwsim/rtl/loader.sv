// Loads a memory image (docs/formats.md, "The memory image"): bytes from DRAM into the rows' memories, the directory of where
// each row tile begins in them, and the channel parameters. One byte is taken in every cycle in which load_valid is high.
//
// Position q of a group's execution order goes to row q mod ROWS as row tile q div ROWS.
module loader #(
    parameter int ROWS = 4,
    parameter int TILE_BITS = 4,
    parameter int CHANNEL_BITS = 8
) (
    input  logic                 clock,
    input  logic                 reset,
    input  logic                 start,
    // Layer.
    input  logic [31:0]          groups,
    input  logic [31:0]          m_blocks,
    input  logic [31:0]          channels,
    input  logic [3:0]           streams,
    input  logic                 sorted,
    input  logic [31:0]          image_bytes,
    // The load port.
    output logic                 load_request,
    output logic [31:0]          load_address,
    input  logic                 load_valid,
    input  logic [7:0]           load_data,
    // The rows.
    output logic [4*ROWS-1:0]    write,
    output logic [31:0]          write_byte,
    output logic [7:0]           write_data,
    output logic [ROWS-1:0]      directory_write,
    output logic [TILE_BITS-1:0] directory_tile,
    output logic [127:0]         directory_bases,
    output logic [31:0]          directory_block_row,
    output logic                 channel_write,
    output logic [CHANNEL_BITS-1:0] channel_index,
    output logic [55:0]          channel_data,
    output logic                 done
);
    localparam logic [2:0] IDLE = 3'd0, ORDER = 3'd1, BEGIN = 3'd2, END = 3'd3, COPY = 3'd4, ENTER = 3'd5, CHANNEL = 3'd6,
        DONE = 3'd7;
    localparam int ROW_BITS = ROWS > 1 ? $clog2(ROWS) : 1;

    logic [2:0] state;
    logic [4*ROWS*32-1:0] used;  // bytes written so far, by row and stream
    logic [127:0] bases;
    logic [31:0] present, order_base, channel_base, group, place, tile, block_row, global_row, index, from;
    logic [31:0] entry, word, next_entry;
    logic [ROW_BITS-1:0] row;
    logic [1:0] stream, next_stream;
    logic more_streams, last_row, taken;
    logic [2:0] byte_count;
    logic [47:0] bytes;

    always_comb begin
        present = 32'(streams[0]) + 32'(streams[1]) + 32'(streams[2]) + 32'(streams[3]);
        order_base = groups * m_blocks * present * 32'd4;
        channel_base = sorted ? order_base + groups * m_blocks * 32'd2 : order_base;
        global_row = group * m_blocks + block_row;
        last_row = global_row + 32'd1 == groups * m_blocks;
        // Place of the current stream among those present, and the next present one.
        entry = '0;
        more_streams = 1'b0;
        next_stream = stream;
        for (int s = 0; s < 4; s++) if (streams[s] && s < 32'(stream)) entry = entry + 32'd1;
        for (int s = 3; s >= 0; s--)
            if (streams[s] && s > 32'(stream)) begin
                more_streams = 1'b1;
                next_stream = 2'(s);
            end
        // A part ends where the next block row's begins, the last of a stream where the next stream begins.
        next_entry = last_row ? entry + 32'd1 : (global_row + 32'd1) * present + entry;
        word = {load_data, bytes[47:24]};

        load_request = 1'b0;
        load_address = '0;
        case (state)
            ORDER: begin
                load_request = 1'b1;
                load_address = order_base + (group * m_blocks + place) * 32'd2 + 32'(byte_count);
            end
            BEGIN: begin
                load_request = 1'b1;
                load_address = (global_row * present + entry) * 32'd4 + 32'(byte_count);
            end
            END: begin
                load_request = 1'b1;
                load_address = next_entry * 32'd4 + 32'(byte_count);
            end
            COPY: begin
                load_request = from != index;
                load_address = from;
            end
            CHANNEL: begin
                load_request = 1'b1;
                load_address = channel_base + index * 32'd7 + 32'(byte_count);
            end
            default: ;
        endcase

    end

    always_comb begin
        taken = load_request && load_valid;
        write = '0;
        write[32'({row, stream})] = state == COPY && taken;
        write_byte = used[32'({row, stream})*32+:32];
        write_data = load_data;
        directory_write = '0;
        directory_write[row] = state == ENTER;
        directory_tile = TILE_BITS'(group * ((m_blocks + 32'(ROWS - 1)) / 32'(ROWS)) + tile);
        directory_bases = bases;
        directory_block_row = block_row;
        channel_write = state == CHANNEL && taken && byte_count == 3'd6;
        channel_index = CHANNEL_BITS'(index);
        channel_data = {load_data, bytes};
        done = state == DONE;
    end

    always_ff @(posedge clock) begin
        if (taken) bytes <= {load_data, bytes[47:8]};
        if (reset) state <= IDLE;
        else if (start) begin
            state <= sorted ? ORDER : (streams == 4'd0 ? ENTER : BEGIN);
            group <= '0;
            place <= '0;
            tile <= '0;
            row <= '0;
            block_row <= '0;
            byte_count <= '0;
            stream <= streams[0] ? 2'd0 : streams[1] ? 2'd1 : streams[2] ? 2'd2 : 2'd3;
            bases <= '0;
            used <= '0;
        end else
            case (state)
                ORDER:
                if (taken) begin
                    byte_count <= byte_count == 3'd1 ? 3'd0 : 3'd1;
                    if (byte_count == 3'd1) begin
                        block_row <= 32'({load_data, bytes[47:40]});
                        state <= BEGIN;
                    end
                end
                BEGIN:
                if (taken) begin
                    byte_count <= byte_count == 3'd3 ? 3'd0 : byte_count + 3'd1;
                    if (byte_count == 3'd3) begin
                        from <= word;
                        bases[{stream, 5'd0}+:32] <= used[32'({row, stream})*32+:32];
                        // The very last part ends with the image.
                        index <= image_bytes;
                        state <= last_row && !more_streams ? COPY : END;
                    end
                end
                END:
                if (taken) begin
                    byte_count <= byte_count == 3'd3 ? 3'd0 : byte_count + 3'd1;
                    if (byte_count == 3'd3) begin
                        index <= word;
                        state <= COPY;
                    end
                end
                COPY:
                if (from == index) begin
                    stream <= next_stream;
                    state <= more_streams ? BEGIN : ENTER;
                end else if (taken) begin
                    from <= from + 32'd1;
                    used[32'({row, stream})*32+:32] <= used[32'({row, stream})*32+:32] + 32'd1;
                end
                ENTER: begin
                    stream <= streams[0] ? 2'd0 : streams[1] ? 2'd1 : streams[2] ? 2'd2 : 2'd3;
                    index <= '0;
                    state <= sorted ? ORDER : (streams == 4'd0 ? ENTER : BEGIN);
                    block_row <= block_row + 32'd1;
                    place <= place + 32'd1;
                    row <= row + 1'b1;
                    if (row == ROW_BITS'(ROWS - 1)) begin
                        row <= '0;
                        tile <= tile + 32'd1;
                    end
                    if (place + 32'd1 == m_blocks) begin
                        block_row <= '0;
                        place <= '0;
                        row <= '0;
                        tile <= '0;
                        group <= group + 32'd1;
                        if (group + 32'd1 == groups) state <= CHANNEL;
                    end
                end
                CHANNEL:
                if (taken) begin
                    byte_count <= byte_count == 3'd6 ? 3'd0 : byte_count + 3'd1;
                    if (byte_count == 3'd6) begin
                        index <= index + 32'd1;
                        if (index + 32'd1 == groups * channels) state <= DONE;
                    end
                end
                default: ;
            endcase
    end
endmodule
