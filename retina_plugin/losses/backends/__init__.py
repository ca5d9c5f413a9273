"""What sums the dense loss over a level: plain PyTorch, compiled C++ for CPUs, Triton for GPUs.

:mod:`.interface` is the contract of a backend, :mod:`.select` chooses one.
"""
