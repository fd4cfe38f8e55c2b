"""The source of our GPU kernels, and the PTX and machine code that `build` compiled from it."""
