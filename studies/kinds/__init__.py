"""Kinds of study: what a point computes and which tables it writes."""
