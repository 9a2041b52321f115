"""The differential test of backward: random programs of hooks, held gradients and accumulation, by ours and by torch.

A program is run four ways, a step at a time:

* `Ours`, with safe_inplace's ops;
* `Torch`, with torch's own in-place methods, one after the other for the fused forms, in the same dtype;
* `Ideal`, with ops that hand on nothing but fresh memory, in the same dtype;
* `Reference`, the same in float64 (complex128), where no leaf takes over memory and whoever keeps a gradient keeps a copy.

After every step of backward all that a user can see (values, `.grad`, retained and returned gradients, what hooks and Functions
kept, the gradients that were given) is in ours what it is in the reference. A leaf's `.grad` shares memory only with
what the ideal ops let it share with, and nothing else shares memory that torch keeps apart.

Torch's own nodes can give one memory to two leaves. Where a program goes wrong with the ideal ops as well, nobody's op
could have helped it, and it ends there.
"""
