"""GPU kernels of the operators, written in Triton.

`specs` says how they are specialised and launched; it imports Triton only when a kernel function is asked for, so
that its tables can be read where Triton is not installed.
"""
