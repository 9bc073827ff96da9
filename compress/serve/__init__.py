"""A variant behind the OpenAI protocol: one process that speaks HTTP, and one for each instance of a runtime that computes."""
