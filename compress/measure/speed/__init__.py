"""Throughput, latency and memory, each model in a process of its own."""
