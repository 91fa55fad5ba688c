// The sequencer of a layer: steps, in them column tiles outside and row tiles inside, in each pass its segments.
//
// It holds the segment that runs and the one after it, which the fill port fetches meanwhile. A segment ends when every row is
// finished and that fill is done; the last segment of a pass also waits for the drain of the pass before
// (docs/microarchitecture.md, section 3, "Between passes"). There is no idle cycle between segments.
//
// Beside it runs the DRAM channel, in phases: before step 0 the loads of step 0; in step i the loads of step i+1, then the store of
// step i-1; behind the last step its store. A step ends when its passes and its phase are done. Two things wait for data: the
// first fill of a step for the inputs that this step's loads bring, and a store for the last drain of its step.
`include "mutants.svh"

module sequencer #(
    parameter int ROWS = 4,
    parameter int COLUMNS = 4,
    parameter int SEGMENT_WORDS = 16,
    parameter int FILL_WORDS = 1,
    parameter int MAX_STEPS = 16,
    parameter int TILE_BITS = 4,
    parameter int COLUMN_BITS = 20
) (
    input  logic                   clock,
    input  logic                   reset,
    input  logic                   start,
    // Layer.
    input  logic [31:0]            m_blocks,
    input  logic [COLUMN_BITS-1:0] k_blocks,
    input  logic [31:0]            steps,
    // A step: group, first row tile, row tiles, first position, positions, weight transfers, input transfers; 32 bits each, the
    // group lowest. The transfers are those that the step needs before it begins.
    input  logic                   step_write,
    input  logic [(MAX_STEPS > 1 ? $clog2(MAX_STEPS) : 1)-1:0] step_index,
    input  logic [223:0]           step_data,
    // Array.
    input  logic                   rows_finished_next,
    output logic                   counting,
    output logic                   segment_load,
    output logic [COLUMN_BITS-1:0] segment_begin,
    output logic [COLUMN_BITS-1:0] segment_end,
    output logic                   pass_load,
    output logic [TILE_BITS:0]     tile,
    output logic [31:0]            tile_rows,
    output logic                   switch_set,
    output logic                   live_set,
    output logic                   half,
    output logic                   segment_done,
    // The drain of the pass that ends.
    output logic                   drain_start,
    output logic [31:0]            drain_group,
    output logic [31:0]            drain_rows,
    output logic [31:0]            drain_width,
    output logic [31:0]            drain_position,
    input  logic                   drain_done_next,
    // The channel: a phase begins with its number of transfers. New weights go to the half that is not in use.
    output logic                   phase_start,
    output logic [31:0]            phase_weights,
    output logic [31:0]            phase_inputs,
    output logic                   phase_store,
    output logic                   phase_half,
    output logic                   store_ready,
    input  logic                   phase_done_next,
    input  logic                   inputs_arrived,
    // The fill port: words fill_column … of the column tile of fill_width positions from fill_position on.
    output logic                   fill_request,
    output logic [31:0]            fill_group,
    output logic [31:0]            fill_position,
    output logic [31:0]            fill_width,
    output logic [COLUMN_BITS-1:0] fill_column,
    output logic [COLUMN_BITS-1:0] fill_left,
    input  logic                   fill_valid,
    // The last cycle of load_0, of a step, or of the last store.
    output logic                   step_done,
    output logic                   done,
    output logic [63:0]            layer_cycles
);
    localparam int STEP_BITS = MAX_STEPS > 1 ? $clog2(MAX_STEPS) : 1;
    localparam logic [2:0] IDLE = 3'd0, LOAD = 3'd1, PRIME = 3'd2, RUN = 3'd3, LAST_DRAIN = 3'd4, STORE = 3'd5, DONE = 3'd6;

    logic [223:0] program_steps[0:MAX_STEPS-1];
    logic [2:0] state;
    logic complete, advance, pass_ends, enters_step, begins_step, weight_half, next_half, draining;
    // The segment that runs.
    logic [31:0] step, group, rows, position, width;
    logic last_of_pass;
    // The one after it; `…_end` and `…_width` follow from these.
    logic next_valid, needs_fill, fill_done_next;
    logic [31:0] next_step, next_tile, next_position, next_width, next_rows, tiles;
    logic [COLUMN_BITS-1:0] next_begin, next_end, filled, filled_next, length;
    logic [31:0] step_group, step_first, step_tiles, step_from, step_positions, step_left, step_weights;
    logic [63:0] following_transfers;
    // The one after that.
    logic after_valid;
    logic [31:0] after_step, after_tile, after_position;
    logic [COLUMN_BITS-1:0] after_begin;

    always_comb begin
        {step_weights, step_positions, step_from, step_tiles, step_first, step_group} =
            program_steps[STEP_BITS'(next_step)][191:0];
        following_transfers = program_steps[STEP_BITS'(next_step + 32'd1)][223:160];
        step_left = step_from + step_positions - next_position;
        next_width = step_left < 32'(COLUMNS) ? step_left : 32'(COLUMNS);
        next_rows = m_blocks - next_tile * 32'(ROWS);
        if (next_rows > 32'(ROWS)) next_rows = 32'(ROWS);
        length = k_blocks - next_begin;
        if (length > COLUMN_BITS'(SEGMENT_WORDS)) length = COLUMN_BITS'(SEGMENT_WORDS);
        `MUTANT(80, if (length > COLUMN_BITS'(SEGMENT_WORDS - 1)) length = COLUMN_BITS'(SEGMENT_WORDS - 1);)
        next_end = next_begin + length;

        after_valid = 1'b1;
        after_step = next_step;
        after_tile = next_tile;
        after_position = next_position;
        after_begin = '0;
        if (next_end != k_blocks) after_begin = next_end;
        else if (next_tile + 32'd1 != step_first + step_tiles) after_tile = next_tile + 32'd1;
        else if (step_left > 32'(COLUMNS)) begin
            after_tile = step_first;
            after_position = next_position + 32'(COLUMNS);
        end else begin
            after_valid = next_step + 32'd1 != steps;
            after_step = next_step + 32'd1;
            after_tile = program_steps[STEP_BITS'(after_step)][63:32];
            after_position = program_steps[STEP_BITS'(after_step)][127:96];
        end
    end

    always_comb begin
        // A column tile of one segment stays in the store for the next row tile.
        needs_fill = next_valid && !(state == RUN && k_blocks <= COLUMN_BITS'(SEGMENT_WORDS)
            && group == step_group && position == next_position && width == next_width);
        `MUTANT(70, if (state == RUN && k_blocks <= COLUMN_BITS'(SEGMENT_WORDS) && group == step_group) needs_fill = 1'b0;)
        `MUTANT(71, needs_fill = next_valid;)
        enters_step = state == RUN && next_valid && next_step != step;
        fill_request = (state == PRIME || state == RUN) && needs_fill && filled < length
            && (!enters_step || inputs_arrived);
        `MUTANT(82, fill_request = (state == PRIME || state == RUN) && needs_fill && filled < length;)
        filled_next = fill_request && fill_valid ? filled + COLUMN_BITS'(FILL_WORDS) : filled;
        `MUTANT(72, if (fill_request) filled_next = filled + COLUMN_BITS'(FILL_WORDS);)
        fill_done_next = !needs_fill || filled_next >= length;
        `MUTANT(73, if (state == RUN) fill_done_next = 1'b1;)
        fill_group = step_group;
        fill_position = next_position;
        fill_width = next_width;
        fill_column = next_begin + filled;
        fill_left = length - filled;

        pass_ends = state == RUN && last_of_pass;
        advance = fill_done_next
            && (state == PRIME || (state == RUN && rows_finished_next && (!last_of_pass || drain_done_next)
                && (!enters_step || phase_done_next)));
        `MUTANT(74, if (pass_ends && rows_finished_next && fill_done_next && (!enters_step || phase_done_next)) advance = 1'b1;)
        `MUTANT(81, if (enters_step && rows_finished_next && fill_done_next && drain_done_next) advance = 1'b1;)
        counting = state == RUN && !complete;
        segment_load = advance && next_valid;
        segment_begin = next_begin;
        segment_end = next_end;
        pass_load = segment_load && next_begin == '0;
        `MUTANT(75, pass_load = segment_load;)
        tile_rows = next_rows;
        `MUTANT(76, tile_rows = 32'(ROWS);)
        tile = {next_half, TILE_BITS'(step_group * tiles + next_tile)};
        `MUTANT(77, tile = {next_half, TILE_BITS'(next_tile)};)
        switch_set = advance && (state == PRIME || pass_ends);
        segment_done = advance && state == RUN;
        drain_start = advance && pass_ends;
        drain_group = group;
        drain_rows = rows;
        drain_width = width;
        drain_position = position;
        done = state == DONE;
    end

    always_comb begin
        // Step 0 begins with its first fill, every other one with its first segment.
        begins_step = (state == LOAD && phase_done_next) || (advance && enters_step);
        next_half = weight_half ^ (begins_step && step_weights != '0);
        `MUTANT(85, next_half = weight_half ^ begins_step;)
        step_done = begins_step || (state == LAST_DRAIN && drain_done_next && phase_done_next)
            || (state == STORE && phase_done_next);
        phase_start = start || (step_done && state != STORE);
        phase_store = (begins_step && state != LOAD) || state == LAST_DRAIN;
        `MUTANT(86, if (state == LAST_DRAIN) phase_store = 1'b0;)
        phase_half = !start && !next_half;
        `MUTANT(84, phase_half = !start && next_half;)
        phase_weights = '0;
        phase_inputs = '0;
        if (start) {phase_inputs, phase_weights} = program_steps[0][223:160];
        else if (begins_step && next_step + 32'd1 != steps) {phase_inputs, phase_weights} = following_transfers;
        store_ready = !draining;
        `MUTANT(83, store_ready = 1'b1;)
    end

    always_ff @(posedge clock) begin
        if (step_write) program_steps[step_index] <= step_data;
        if (reset) begin
            state <= IDLE;
            complete <= 1'b0;
            live_set <= 1'b0;
            half <= 1'b0;
            next_valid <= 1'b0;
            filled <= '0;
            layer_cycles <= '0;
            weight_half <= 1'b1;
            draining <= 1'b0;
        end else if (start) begin
            state <= LOAD;
            weight_half <= 1'b1;
            complete <= 1'b0;
            layer_cycles <= '0;
            tiles <= (m_blocks + 32'(ROWS - 1)) / 32'(ROWS);
            next_valid <= 1'b1;
            next_step <= '0;
            next_tile <= program_steps[0][63:32];
            next_position <= program_steps[0][127:96];
            next_begin <= '0;
            filled <= '0;
        end else begin
            if (state != IDLE && state != DONE) layer_cycles <= layer_cycles + 64'd1;
            weight_half <= next_half;
            // The drain of the step before ends within the first pass of this one; later drains are none of its store's.
            draining <= (advance && enters_step) || (draining && !drain_done_next);
            if (state == LOAD && phase_done_next) state <= PRIME;
            complete <= state == RUN && rows_finished_next && !advance;
            filled <= advance ? '0 : filled_next;
            if (switch_set) live_set <= !live_set;
            `MUTANT(78, if (switch_set) live_set <= live_set;)
            if (advance) begin
                state <= next_valid ? RUN : LAST_DRAIN;
                if (needs_fill) half <= !half;
                `MUTANT(79, half <= half;)
                step <= next_step;
                group <= step_group;
                rows <= next_rows;
                position <= next_position;
                width <= next_width;
                last_of_pass <= next_end == k_blocks;
                next_valid <= next_valid && after_valid;
                next_step <= after_step;
                next_tile <= after_tile;
                next_position <= after_position;
                next_begin <= after_begin;
            end
            if (state == LAST_DRAIN && drain_done_next && phase_done_next) state <= STORE;
            if (state == STORE && phase_done_next) state <= DONE;
        end
    end
endmodule
