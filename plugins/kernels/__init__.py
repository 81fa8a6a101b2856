"""GPU kernels of the operators, written in Triton.

The sources import nothing of this project but each other. `specs` says how they are specialised and launched; it
imports Triton only when a kernel function is asked for, so that tables can be read where Triton is not installed.
"""
