"""The one place that knows Ray: workers, shards, the seam that drives them, and the stages of a run."""
