"""The study of ``jobs/word_order.py``: invented facts, told in several orders of the same words."""
