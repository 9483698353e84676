"""The study of ``jobs/lds.py``: models trained on subsets, and every kind of score held against them."""
