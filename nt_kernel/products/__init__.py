"""What Gram matrices are made of: products of structured rows, by the cheapest of several orders, tile by tile."""
