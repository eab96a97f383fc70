"""What the losses cost, against eager PyTorch and torch.compile.

`python -m benchmarks` measures the contenders in turns and writes the record that claims rest on.
`pytest benchmarks` has the same workloads under pytest-benchmark, for work on a kernel.
"""
