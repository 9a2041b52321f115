"""What the ops cost beside torch's own, `torch.compile` and Triton: `python -m benchmarks --help`."""
