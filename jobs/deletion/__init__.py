"""The study of ``jobs/case_deletion.py``: sentences left out of a small classifier's training, by their scores."""
