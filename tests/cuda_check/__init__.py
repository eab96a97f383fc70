"""What the compilers made of the kernels, for every chip and without one: `make cuda-check`."""
