"""Accuracy: MTEB tasks, their data, scores, and paired statistics."""
