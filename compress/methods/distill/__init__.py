"""Distillation: a student taught to give a teacher's vectors."""
