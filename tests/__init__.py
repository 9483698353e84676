"""The tests. A package, so that no installed `tests` takes its place."""
