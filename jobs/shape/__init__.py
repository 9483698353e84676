"""The study of ``jobs/influence_shape.py``: how influence is spread over sequences, layers and ranks."""
