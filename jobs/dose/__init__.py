"""The study of ``jobs/dose_curve.py``: sequences that a method chooses, trained on less or more, and what that does."""
