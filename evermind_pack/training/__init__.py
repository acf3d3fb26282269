"""Trainers for the Evermind families, run folders and text corpora."""
