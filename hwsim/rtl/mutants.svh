// Single faults for `hwsim mutants`: with HWSIM_MUTANTS defined, the run-time argument +mutant=N plants fault N of
// hwsim/mutation.py; without, nothing of them is in the design.
`ifndef HWSIM_MUTANTS_SVH
`define HWSIM_MUTANTS_SVH
`ifdef HWSIM_MUTANTS
package mutants;
    function automatic int chosen();
        if ($value$plusargs("mutant=%d", chosen) == 0) chosen = 0;
    endfunction
    int planted = chosen();
endpackage
`define MUTANT(number, fault) if (mutants::planted == number) begin fault end
`else
`define MUTANT(number, fault)
`endif
`endif
