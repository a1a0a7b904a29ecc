"""Peers that live in environments of their own: what to install there, and the workers that run there."""
