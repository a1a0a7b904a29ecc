"""A recorder around any training loop, and what two recorded runs say of their divergence: measured, bounded, enclosed."""
