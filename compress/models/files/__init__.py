"""Files of a model: headers, weights, shards, and what a variant's folder says of itself. No torch in headers and variant."""
