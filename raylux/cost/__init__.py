"""What a run costs, from shapes alone: bytes, FLOPs, seconds. Pure functions; neither Ray nor Zarr.

The engine takes its choices from ``sizes`` and ``contraction``; ``raylux plan`` and docs/scaling.md are made of the
rest. One multiplication with its addition counts as two FLOPs.
"""
