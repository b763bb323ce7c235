"""Pieces of a model that are computed once per step and shared by its layers."""
