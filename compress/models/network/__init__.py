"""Networks in torch: built, split into segments, walked, pruned, and pooled into vectors."""
