"""The study of ``jobs/cross_lingual.py``: influence from one language on another, by the size of the model."""
