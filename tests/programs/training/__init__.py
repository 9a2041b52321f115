"""Random training programs: modules, optimizers, kept and retained graphs, and all that writes to their values.

Each runs in plain torch, under guard in every mode, and once with hooks that keep a snapshot of every value that autograd
saves. The snapshots are the judge: which backward asks for a value that is no longer what was saved, what a write
destroyed, and what the gradients are where it is given the snapshot.
"""
