"""What jobs/driver.py runs: passes of the engine's own, and real actors that only sleep."""
