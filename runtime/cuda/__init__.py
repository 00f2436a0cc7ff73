"""CUDA kernels: their sources, the binary built from them, and what a host must know to launch them.

`README.md` in this folder is the interface: entries, parameters, workspace, launches.
"""
