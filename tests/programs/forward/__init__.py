"""The differential test: random programs of views, saves and writes, by ours and by torch.

A program is run three ways:

* `Ours`, with safe_inplace's ops;
* `Torch`, with torch's own in-place methods (one after the other for the fused forms), or
  out of place and `copy_` where an operand of a fused form shares the input's memory;
* `Functional`, which never writes: memory is a value, a write makes the next value. It
  decides who is right where torch refuses and ours does not, and is held equal to torch where it does not.

They must agree in every value and gradient, or raise at the same step.
"""
