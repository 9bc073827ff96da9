"""What methods learn from texts."""
