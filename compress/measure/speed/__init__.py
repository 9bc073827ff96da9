"""Throughput, latency and memory; each model runs in its own process."""
