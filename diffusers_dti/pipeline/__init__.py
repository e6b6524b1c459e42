"""Concepts in a pipeline: load, unload, save and inspect them."""
