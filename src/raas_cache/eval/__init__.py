"""Evaluation: tasks, runners and their statistics."""
