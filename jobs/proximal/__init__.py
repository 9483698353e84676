"""The study of ``jobs/proximal_methods.py``: methods against the proximal optimum, and what each takes."""
