"""What tensorfork costs, beside the limits of the machine it runs on. `python -m benchmarks --help`.

This package runs in two kinds of processes. The one that is started asks, computes ratios and writes; it never imports
torch. Its workers (`benchmarks.worker`) measure: one subprocess, or a few that talk to each other, for every case, so
that no case finds what another left behind.
"""
