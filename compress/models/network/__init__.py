"""Networks in torch: built, taken apart into segments, walked, cut smaller, and pooled into vectors."""
