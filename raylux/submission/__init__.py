"""Runs as jobs of a Ray cluster: checked here first, named by run and attempt, followed to their own exit code."""
