"""Kernelized Dynamics Pruning, step by step."""
