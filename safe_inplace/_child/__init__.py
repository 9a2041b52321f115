"""The folder on the PYTHONPATH of the processes that a guarded one starts."""
