"""The kernels as `torch.library` operators, and one `autograd.Function` per loss outside them.

An operator takes the backend's name and calls the kernel of that name; operators allocate every
output, kernels only fill them.
"""
