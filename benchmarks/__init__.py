"""What the claims about speed and memory rest on: `python -m benchmarks` measures and writes tables and curves."""
