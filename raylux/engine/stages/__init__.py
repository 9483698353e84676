"""The stages of a run. Each reads and writes the run folder alone, and does only what is missing there."""
