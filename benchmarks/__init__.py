"""What tensorfork costs, beside the limits of the machine it runs on. `python -m benchmarks --help`.

There are two kinds of processes. The one that is started runs the cases, computes ratios and writes results; it never
imports torch. Its workers (`benchmarks.worker`) measure. Every case starts its own, so that no case finds what another
left behind.
"""
