"""The losses as fast kernels: `native` hands tensors to the compiled module, `triton` to Triton.

A backend is a module with one function per kernel of `fastkd.ops` and a `refuse(facts)`.
"""
