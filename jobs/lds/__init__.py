"""The study of ``jobs/datamodel.py``: models trained on subsets, and every kind of score held against them."""
