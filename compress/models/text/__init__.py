"""From texts to token ids: how a model takes texts, its tokenizer, and trimmed vocabularies. No torch."""
