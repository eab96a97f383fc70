"""What the losses cost, against eager PyTorch and torch.compile: `python -m benchmarks`."""
