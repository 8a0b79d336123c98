"""Measures and inspects radam_kernels: what a step costs, and what the compilers made of it."""
