"""Heads as arrays, and checks that numbers are finite."""
