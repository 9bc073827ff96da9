"""Texts to token ids: what a model's files say about texts, its tokenizer, and smaller vocabularies. No torch."""
