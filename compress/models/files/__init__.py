"""A model's files: headers, weights, shards, and `variant.json`. No torch in headers and variant."""
