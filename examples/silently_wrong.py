"""A wrong gradient without any error: exp saved h for backward, and the version counter does not see this write."""

import torch

x = torch.ones(3, requires_grad=True)
h = x.exp()
h.data.add_(1)
h.sum().backward()
print("x.grad =", x.grad.tolist())
