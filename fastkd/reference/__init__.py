"""The losses in plain PyTorch: the specification, the last fallback, and double backward.

Each function states an equation as it is read in the paper, in float32 (float64 for float64
inputs), with autograd for its derivatives. Arguments have been checked by `fastkd.losses`.
"""
